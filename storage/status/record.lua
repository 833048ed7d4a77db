local everything = 'inferq:l:' .. tenant
-- A cancel request for a task without a record, which only the broker may know.
local cancelled_early = 'inferq:x:' .. tenant .. ':' .. id
local begun = false

local function state_index(state)
  if state ~= 'succeeded' then return 'inferq:s:' .. tenant .. ':' .. state end
end

local function index(zset, score)
  redis.call('ZADD', zset, score, id)
  redis.call('EXPIRE', zset, retention + 86400)
  -- Each new entry deletes up to two entries of expired tasks.
  for _, oldest in ipairs(redis.call('ZRANGE', zset, 0, 1)) do
    if oldest ~= id and redis.call('EXISTS', 'inferq:t:' .. tenant .. ':' .. oldest) == 0 then
      redis.call('ZREM', zset, oldest)
    end
  end
end

local function score_of(created)
  -- A wrong creation time must not hide a task from the listing or keep its entry forever.
  return number(math.max(math.min(created, now), now - retention * 1e6))
end

local function create(ty, priority, batch, digest, created, state, order, attempt)
  if created == '' then created = number(now) end
  local score = score_of(tonumber(created))
  redis.call('HSET', key, 'ty', ty, 'd', digest, 'c', created, 's', state, 'o', number(order),
    'a', attempt, 'i', score)
  if priority ~= '' and priority ~= 'normal' then redis.call('HSET', key, 'p', priority) end
  if redis.call('DEL', cancelled_early) == 1 then redis.call('HSET', key, 'x', number(now)) end
  redis.call('EXPIRE', key, retention)
  index(everything, score)
  if batch ~= '' then
    redis.call('HSET', key, 'b', batch)
    index('inferq:b:' .. tenant .. ':' .. batch, score)
  end
  local by_state = state_index(state)
  if by_state then index(by_state, score) end
end

local function move(state, order, attempt, redrives)
  local old, score = unpack(redis.call('HMGET', key, 's', 'i'))
  if old ~= state then
    local left, entered = state_index(old), state_index(state)
    if left then redis.call('ZREM', left, id) end
    if entered then index(entered, score) end
  end
  if old == 'failed' or old == 'cancelled' then
    -- Redriven: a cancel request was for the previous run.
    redis.call('HDEL', key, 'x', 'f')
  end
  redis.call('HSET', key, 's', state, 'o', number(order), 'a', attempt)
  if redrives ~= '0' then redis.call('HSET', key, 'r', redrives) end
  redis.call('EXPIRE', key, retention)
end

local function publish(event)
  redis.call('PUBLISH', 'inferq:events:' .. tenant .. ':' .. id, event)
end
