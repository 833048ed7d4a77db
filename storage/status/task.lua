local ty, priority, digest, created = ARGV[5], ARGV[6], ARGV[8], ARGV[9]
local batch, line, trace = string.match(ARGV[7], '^([^/@]*)/?(%d*)@?(%x*)$')
local known, order = unpack(redis.call('HMGET', key, 'd', 'o'))
local unconfirmed = begun and known and known ~= digest and tonumber(order) % 10 == 0
if (known == '' or unconfirmed) and digest ~= '' then
  -- The task supersedes the end of an unreadable message with its id, and a submission under its id that
  -- was never confirmed.
  local left = state_index(redis.call('HGET', key, 's'))
  if left then redis.call('ZREM', left, id) end
  redis.call('DEL', key)
  known, order = false, false
end
order = tonumber(order or -1)
local conflict = known and known ~= '' and digest ~= '' and known ~= digest

local function note_trace()
  if trace ~= '' then redis.call('HSET', key, 'tr', trace) end
end
