local attempt, redrives = ARGV[5], ARGV[6]
if tonumber(redis.call('HGET', key, 'o') or -1) ~= order_of(redrives, attempt, RUNNING) then return 0 end
return redis.call('HDEL', key, 'l')
