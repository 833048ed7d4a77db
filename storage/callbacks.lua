local record, failures, all = KEYS[1], KEYS[2], KEYS[3]
local id, state, json, member, now, retention = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local resent = ARGV[9]
local before = redis.call('HGET', record, id)
if before and state ~= 'delivered' then
  local known = cjson.decode(before)
  local sent = type(known.resent_at) == 'string' and string.gsub(known.resent_at, 'Z$', '') or ''
  -- A resend stands over what was sent before it, and a delivery over a late copy of it.
  if resent < sent or (resent == sent and known.state == 'delivered') then return 0 end
end
if not before and redis.call('HLEN', record) >= tonumber(ARGV[8]) then return 0 end
redis.call('HSET', record, id, json)
redis.call('EXPIRE', record, retention)
local known_by_all = ARGV[10] .. ':' .. member
if state == 'failed' then
  redis.call('ZADD', all, now, known_by_all)
  redis.call('ZREMRANGEBYRANK', all, 0, -1 - tonumber(ARGV[7]))
  redis.call('EXPIRE', all, retention)
  redis.call('ZADD', failures, now, member)
  redis.call('ZREMRANGEBYRANK', failures, 0, -1 - tonumber(ARGV[7]))
  redis.call('EXPIRE', failures, retention)
elseif before then
  redis.call('ZREM', failures, member)
  redis.call('ZREM', all, known_by_all)
end
return 1
