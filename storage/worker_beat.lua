-- A worker's heartbeat. KEYS: its record, the index of workers by their last heartbeat, the counts of deliveries
-- taken. ARGV: id, record (empty: the worker ends), seconds that a heartbeat counts, seconds that counts are kept, then
-- pairs of a lane and its deliveries since the last heartbeat.
local record, index, taken = KEYS[1], KEYS[2], KEYS[3]
local id, text, seconds = ARGV[1], ARGV[2], tonumber(ARGV[3])
if text == '' then
  redis.call('DEL', record)
  redis.call('ZREM', index, id)
else
  local now = redis.call('TIME')
  local moment = tonumber(now[1]) + tonumber(now[2]) / 1e6
  redis.call('SET', record, text, 'EX', seconds)
  redis.call('ZADD', index, string.format('%.3f', moment), id)
  redis.call('ZREMRANGEBYSCORE', index, '-inf', string.format('%.3f', moment - seconds))
  redis.call('EXPIRE', index, seconds)
end
for at = 5, #ARGV, 2 do
  redis.call('HINCRBY', taken, ARGV[at], ARGV[at + 1])
end
redis.call('EXPIRE', taken, ARGV[4])
return 1
