local tenant, ty, state, batch, score, last = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local wanted, scan = tonumber(ARGV[7]), 500
local zset = 'inferq:l:' .. tenant
if batch ~= '' then zset = 'inferq:b:' .. tenant .. ':' .. batch
elseif state ~= '' and state ~= 'succeeded' then zset = 'inferq:s:' .. tenant .. ':' .. state end

local start = 0
if last ~= '' then
  -- The cursor's entry may have been deleted: insert it briefly to find its rank among equal times.
  local there = redis.call('ZSCORE', zset, last)
  if not there or tonumber(there) ~= tonumber(score) then redis.call('ZADD', zset, score, last) end
  start = redis.call('ZREVRANK', zset, last) + 1
  if not there then redis.call('ZREM', zset, last) else redis.call('ZADD', zset, there, last) end
  if not there or tonumber(there) < tonumber(score) then start = start - 1 end
end

local entries = redis.call('ZREVRANGE', zset, start, start + scan - 1, 'WITHSCORES')
local reply = {'', ''}
for i = 1, #entries, 2 do
  local id = entries[i]
  local key = 'inferq:t:' .. tenant .. ':' .. id
  local found = redis.call('HMGET', key, 's', 'ty', 'b')
  if not found[1] then
    redis.call('ZREM', zset, id)
  elseif (ty == '' or found[2] == ty) and (state == '' or found[1] == state)
      and (batch == '' or found[3] == batch) then
    reply[#reply + 1] = {entries[i + 1], id, redis.call('HGETALL', key)}
  end
  if #reply - 2 >= wanted or (i + 1 == #entries and #entries == 2 * scan) then
    reply[1], reply[2] = entries[i + 1], id
    break
  end
end
return reply
