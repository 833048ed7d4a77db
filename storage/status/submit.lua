local call = ARGV[10]
local new = 0
if not known then
  -- A cancel request for this id was for an earlier task.
  redis.call('DEL', cancelled_early)
  create(ty, priority, batch, digest, created, 'queued', order_of(0, 1, 0), 1)
  redis.call('HSET', key, 'k', call)
  note_trace()
  new = 1
elseif redis.call('HGET', key, 'k') == call then
  new = 1
end
order = tonumber(redis.call('HGET', key, 'o'))
local confirmed = order % 10 > 0 and 1 or 0
local reply = {new, confirmed, conflict and 1 or 0}
for _, part in ipairs(redis.call('HGETALL', key)) do reply[#reply + 1] = part end
return reply
