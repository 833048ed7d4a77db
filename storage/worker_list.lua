-- The workers of the newest heartbeats, and the counts of deliveries taken. KEYS: the index of workers, the counts.
-- ARGV: the prefix of a worker's record, the most workers.
local found = redis.call('ZRANGE', KEYS[1], -tonumber(ARGV[2]), -1, 'WITHSCORES')
local now = redis.call('TIME')
local moment = tonumber(now[1]) + tonumber(now[2]) / 1e6
local workers = {}
for at = 1, #found, 2 do
  local text = redis.call('GET', ARGV[1] .. found[at])
  if text then
    workers[#workers + 1] = {text, string.format('%.3f', moment - tonumber(found[at + 1]))}
  end
end
return {workers, redis.call('HGETALL', KEYS[2])}
