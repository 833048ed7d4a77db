local ty, priority, digest, created = ARGV[5], ARGV[6], ARGV[8], ARGV[9]
local batch, line = string.match(ARGV[7], '^([^/]*)/?(%d*)$')
local known, order = unpack(redis.call('HMGET', key, 'd', 'o'))
local unconfirmed = begun and known and known ~= digest and tonumber(order) % 10 == 0
if (known == '' or unconfirmed) and digest ~= '' then
  -- The end of an unreadable message that named this id gives way to the task itself, and so does what was
  -- submitted under it and not accepted.
  local left = state_index(redis.call('HGET', key, 's'))
  if left then redis.call('ZREM', left, id) end
  redis.call('DEL', key)
  known, order = false, false
end
order = tonumber(order or -1)
local conflict = known and known ~= '' and digest ~= '' and known ~= digest
