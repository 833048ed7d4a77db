local USAGE_KEPT = 400 * 86400

-- One more end, or attempt that is retried, of a type and day, and the microseconds that an engine took. A caller without
-- a day counts nothing. HGET and HSET, not HINCRBY: users of Redis may have the rights of an earlier version.
local function count_usage(day, ty, what, micros)
  if day == '' then return end
  local usage, field = 'inferq:usage:' .. day, tenant .. ':' .. ty
  local count, spent = unpack(redis.call('HMGET', usage, field .. ':' .. what, field .. ':us'))
  redis.call('HSET', usage, field .. ':' .. what, number((count or 0) + 1), field .. ':us',
    number((spent or 0) + tonumber(micros)))
  redis.call('EXPIRE', usage, USAGE_KEPT)
end
