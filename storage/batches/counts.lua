local function counts()
  local found = {}
  for _, state in ipairs({'fed', 'succeeded', 'failed', 'cancelled', 'invalid', 'cached'}) do
    found[#found + 1] = redis.call('BITCOUNT', bits(state, batch))
  end
  return found
end

local function sample(ended)
  local latest = redis.call('HGET', key, 'then')
  local at = latest and tonumber(string.match(latest, '^(%d+)'))
  if not at or math.abs(now - at) >= 2e6 then
    if latest then redis.call('HSET', key, 'before', latest) end
    redis.call('HSET', key, 'then', string.format('%.0f %.0f', now, ended))
  end
end
