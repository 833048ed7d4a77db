local fraction, note, timestamp = ARGV[5], ARGV[6], ARGV[7]
local state, ty, attempt, batch, before, redrives, trace =
  unpack(redis.call('HMGET', key, 's', 'ty', 'a', 'b', 'g', 'r', 'tr'))
if state ~= 'running' or (before and tonumber(before) > tonumber(fraction)) then return 0 end
redis.call('HSET', key, 'g', fraction, 'n', note)
redis.call('EXPIRE', key, retention)
local data = {task_id = id, task_type = ty, tenant = tenant, state = 'running', attempt = tonumber(attempt),
  progress = tonumber(fraction), batch_id = batch or nil, trace_id = trace or nil}
-- The same as inferq.schemas.sequence_of.
local attempts = math.min(tonumber(redrives or 0), 1e6) * 1000 + math.min(tonumber(attempt), 998)
data.sequence = attempts * 10000 + 1 + math.floor(tonumber(fraction) * 9996)
if note ~= '' then data.note = note end
publish(cjson.encode({type = 'task.progress', timestamp = timestamp, version = tonumber(ARGV[8]), data = data}))
return 1
