-- The lease of a run is the field `h`: when the run last gave a sign of life, and its token. Only the clock of Redis
-- counts, because those of the workers differ.
local function milliseconds()
  local seconds, micros = unpack(redis.call('TIME'))
  return tonumber(seconds) * 1000 + math.floor(tonumber(micros) / 1000)
end

local function renew(run)
  redis.call('HSET', key, 'h', number(milliseconds()) .. ' ' .. run)
end

local function holds(run)
  return run ~= '' and string.match(redis.call('HGET', key, 'h') or '', '^%d+ (.*)$') == run
end

-- Whether the task is in progress and no run has its lease. A task without a record stays without one.
local function is_free()
  local order, lease = unpack(redis.call('HMGET', key, 'o', 'h'))
  return order and not lease and tonumber(order) % 10 ~= ENDED
end

local function release(run)
  if holds(run) then redis.call('HDEL', key, 'h') end
end

-- The lease of another run that gave a sign of life within `silence` milliseconds; empty if there is none. A time in
-- the future is from before the clock was set back: it proves nothing.
local function lease_of_another(run, silence)
  local lease = redis.call('HGET', key, 'h')
  if not lease then return '' end
  local at, holder = string.match(lease, '^(%d+) (.*)$')
  local age = milliseconds() - tonumber(at)
  if holder == run or age < 0 or age >= silence then return '' end
  return lease
end
