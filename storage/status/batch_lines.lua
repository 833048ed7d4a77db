local ENDS = {'succeeded', 'failed', 'cancelled'}

local function batch_key(batch) return 'inferq:batch:' .. tenant .. ':' .. batch end
local function bits(state, batch) return 'inferq:bits:' .. state .. ':' .. tenant .. ':' .. batch end

local function keep_batch(batch)
  for _, key in ipairs({batch_key(batch), bits('fed', batch), bits('succeeded', batch), bits('failed', batch),
      bits('cancelled', batch), bits('invalid', batch), bits('cached', batch)}) do
    redis.call('EXPIRE', key, retention)
  end
end

-- Returns whether the line changed: nothing supersedes a success, a later report supersedes anything else.
local function end_line(batch, line, state)
  local at = tonumber(line) - 1
  if redis.call('GETBIT', bits('succeeded', batch), at) == 1 then return 0 end
  local was = redis.call('GETBIT', bits(state, batch), at)
  if was == 1 then return 0 end
  for _, other in ipairs(ENDS) do
    local key = bits(other, batch)
    if redis.call('GETBIT', key, at) == 1 then redis.call('SETBIT', key, at, 0) end
  end
  redis.call('SETBIT', bits(state, batch), at, 1)
  redis.call('SETBIT', bits('fed', batch), at, 1)
  return 1
end
