local attempts, redrives, state, started, finished = ARGV[10], ARGV[11], ARGV[12], ARGV[13], ARGV[14]
local worker, failure, event, call, day, micros = ARGV[15], ARGV[16], ARGV[17], ARGV[18], ARGV[19], ARGV[20]
local cached = ARGV[21] == '1'
local ends = state == 'succeeded' and SUCCEEDED + ENDED or order_of(redrives, MAX_ATTEMPT, ENDED)
if known and redis.call('HGET', key, 'k') == call then return 1 end
if conflict then return 0 end
if line ~= '' then
  -- A later redrive has a later order and stays.
  if ends > order then
    redis.call('DEL', key)
    for _, zset in ipairs({everything, state_index('queued'), state_index('running'), state_index('retrying'),
        state_index('failed'), state_index('cancelled'), 'inferq:b:' .. tenant .. ':' .. batch}) do
      redis.call('ZREM', zset, id)
    end
  end
  -- Ignore a line that the batch may not have: its feeder reads the object store.
  if tonumber(line) <= tonumber(redis.call('HGET', batch_key(batch), 'n') or 0) then
    if cached then redis.call('SETBIT', bits('cached', batch), tonumber(line) - 1, 1) end
    if end_line(batch, line, state) == 0 then return 0 end
    keep_batch(batch)
  elseif not known then
    return 0
  end
  count_usage(day, ty, state, micros)
  publish(event)
  return 1
end
if ends <= order then return 0 end
local attempt = tonumber(attempts) < 1 and '1' or attempts
if not known then create(ty, priority, batch, digest, created, state, ends, attempt) end
move(state, ends, attempt, redrives)
redis.call('HSET', key, 'f', finished, 'k', call)
if started ~= '' then redis.call('HSET', key, 'st', started) end
if worker ~= '' then redis.call('HSET', key, 'w', worker) end
note_trace()
-- Progress is of a run. The same as TaskStatus.of_result.
redis.call('HDEL', key, 'e', 'h', 'l', 'g', 'n')
if failure ~= '' then redis.call('HSET', key, 'e', failure) end
if state == 'succeeded' then redis.call('HSET', key, 'g', '1') end
count_usage(day, ty, state, micros)
publish(event)
return 1
