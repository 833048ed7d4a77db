local attempt, redrives, run, keep_lease, keep_run = ARGV[5], ARGV[6], ARGV[7], ARGV[8] == '1', ARGV[9] == '1'
if not keep_lease then release(run) end
if tonumber(redis.call('HGET', key, 'o') or -1) ~= order_of(redrives, attempt, RUNNING) then return 0 end
-- Another worker may have begun the task since: its run is not released by this one.
if string.match(redis.call('HGET', key, 'l') or '', '^%d+ (.*)$') ~= run then return 0 end
if keep_run then return 0 end
return redis.call('HDEL', key, 'l')
