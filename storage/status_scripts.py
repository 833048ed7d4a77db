"""The Lua scripts of the status index, and the shape of what it keeps in Redis.

A task is a hash under `inferq:t:<tenant>:<task_id>` with short field names:
    ty type  p priority  b batch  d digest  c created  s state  o order  a attempt  r redrives
    w worker  st started  f finished  g progress  n note  e error (JSON)  x cancel flag
    k the call that created or ended it, so that the repeat of a call whose answer was lost gets the same
    l how many runs of the attempt on record began in a row without an orderly end, and the last one's token
Times are microseconds since 1970. Sorted sets, scored by creation time, index the tasks of a tenant
(`inferq:l:<tenant>`), of a batch (`inferq:b:<tenant>:<batch>`), and of each state but `succeeded`
(`inferq:s:<tenant>:<state>`), which is most of the whole and is found by looking through it.

The order number is redrives * 1e6 + attempt * 10 + rank; an end counts as past every attempt of its redrive,
a success as past everything.

A task that says its line in a batch has a hash only while it runs or waits for a retry: queued it is one of
the batch's fed lines, ended one of the succeeded, failed or cancelled ones (see inferq.storage.batch_scripts).
"""

from __future__ import annotations

from inferq.storage import batch_scripts


def record_key(tenant: str, task_id: str) -> str:
    """The key of a task's hash. A tenant holds no colon, so that no two tasks share one."""
    return f"inferq:t:{tenant}:{task_id}"


_SHARED = """
local QUEUED, RUNNING, RETRYING, ENDED = 1, 2, 3, 4
local MAX_ATTEMPT, SUCCEEDED = 99999, 8e15
local DAY = 86400e6

local function order_of(redrives, attempt, rank)
  return math.min(tonumber(redrives), 1e9) * 1e6 + math.min(tonumber(attempt), MAX_ATTEMPT) * 10 + rank
end

local function number(value)
  return string.format('%.0f', value)
end
"""

_RECORD = (
    _SHARED
    + """
local key = KEYS[1]
local tenant, id, retention, now = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
"""
    + batch_scripts.LINES
    + """
local everything = 'inferq:l:' .. tenant
local begun = false

local function state_index(state)
  if state ~= 'succeeded' then return 'inferq:s:' .. tenant .. ':' .. state end
end

local function index(zset, score)
  redis.call('ZADD', zset, score, id)
  redis.call('EXPIRE', zset, retention + 86400)
  -- Each entry that comes lets two go whose tasks have expired.
  for _, oldest in ipairs(redis.call('ZRANGE', zset, 0, 1)) do
    if oldest ~= id and redis.call('EXISTS', 'inferq:t:' .. tenant .. ':' .. oldest) == 0 then
      redis.call('ZREM', zset, oldest)
    end
  end
end

local function score_of(created)
  -- A made-up time must neither hide a task from the listing nor keep its entry for ever.
  return number(math.max(math.min(created, now), now - retention * 1e6))
end

local function create(ty, priority, batch, digest, created, state, order, attempt)
  if created == '' then created = number(now) end
  local score = score_of(tonumber(created))
  redis.call('HSET', key, 'ty', ty, 'd', digest, 'c', created, 's', state, 'o', number(order),
    'a', attempt, 'i', score)
  if priority ~= '' and priority ~= 'normal' then redis.call('HSET', key, 'p', priority) end
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
    -- Redriven: whoever asked for a cancellation had the run before in mind.
    redis.call('HDEL', key, 'x', 'f')
  end
  redis.call('HSET', key, 's', state, 'o', number(order), 'a', attempt)
  if redrives ~= '0' then redis.call('HSET', key, 'r', redrives) end
  redis.call('EXPIRE', key, retention)
end

local function publish(event)
  redis.call('PUBLISH', 'inferq:events:' .. tenant .. ':' .. id, event)
end
"""
)

_BEGUN = """
begun = true
"""
"""Stands before what a worker tells: the task is in its hands."""

_TASK = """
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
"""

_SUBMIT = """
local attempt, call = ARGV[10], ARGV[11]
local new = 0
if not known then
  create(ty, priority, batch, digest, created, 'queued', order_of(0, attempt, 0), attempt)
  redis.call('HSET', key, 'k', call)
  new = 1
elseif redis.call('HGET', key, 'k') == call then
  new = 1
end
order = tonumber(redis.call('HGET', key, 'o'))
local confirmed = order % 10 > 0 and 1 or 0
local reply = {new, confirmed, conflict and 1 or 0}
for _, part in ipairs(redis.call('HGETALL', key)) do reply[#reply + 1] = part end
return reply
"""

_CONFIRM = """
if conflict then return -1 end
if not known then
  create(ty, priority, batch, digest, created, 'queued', order_of(0, 1, QUEUED), 1)
elseif order % 10 == 0 then
  redis.call('HSET', key, 'o', number(order + QUEUED))
  redis.call('EXPIRE', key, retention)
else
  return 0
end
publish(ARGV[10])
return 1
"""

_FORGET = """
local known, order, score, batch = unpack(redis.call('HMGET', key, 'd', 'o', 'i', 'b'))
if not known or known ~= ARGV[5] or tonumber(order) % 10 ~= 0 then return 0 end
redis.call('DEL', key)
redis.call('ZREM', everything, id)
redis.call('ZREM', state_index('queued'), id)
if batch then redis.call('ZREM', 'inferq:b:' .. tenant .. ':' .. batch, id) end
return 1
"""

_BEGIN = """
local attempt, redrives, worker, started, event = ARGV[10], ARGV[11], ARGV[12], ARGV[13], ARGV[14]
local run = ARGV[15]
local begins = order_of(redrives, attempt, RUNNING)
local lost = -1
if not conflict and begins >= order then
  local runs = 1
  if begins == order then
    -- The attempt had begun already, and neither a retry nor an end has moved it on since.
    local before, last = string.match(redis.call('HGET', key, 'l') or '0 ', '^(%d+) (.*)$')
    runs = tonumber(before) + (last == run and 0 or 1)
  end
  lost = runs - 1
  if not known then
    -- One that does not say when it was created cannot have been so after its start.
    if created == '' then created = number(math.min(now, tonumber(started))) end
    create(ty, priority, batch, digest, created, 'running', begins, attempt)
  end
  move('running', begins, attempt, redrives)
  redis.call('HSET', key, 'w', worker, 'st', started, 'l', number(runs) .. ' ' .. run)
  redis.call('HDEL', key, 'g', 'n', 'e')
  if begins > order then publish(event) end
end
local state, cancel = unpack(redis.call('HMGET', key, 's', 'x'))
if batch ~= '' then
  local whole, own = unpack(redis.call('HMGET', batch_key(batch), 'x', 'x:' .. line))
  cancel = cancel or whole or (line ~= '' and own)
end
return {known or '', cancel and 1 or 0, state, lost}
"""

_RELEASED = """
local attempt, redrives = ARGV[5], ARGV[6]
if tonumber(redis.call('HGET', key, 'o') or -1) ~= order_of(redrives, attempt, RUNNING) then return 0 end
return redis.call('HDEL', key, 'l')
"""

_PROGRESS = """
local fraction, note, timestamp = ARGV[5], ARGV[6], ARGV[7]
local state, ty, attempt, batch, before, redrives =
  unpack(redis.call('HMGET', key, 's', 'ty', 'a', 'b', 'g', 'r'))
if state ~= 'running' or (before and tonumber(before) > tonumber(fraction)) then return 0 end
redis.call('HSET', key, 'g', fraction, 'n', note)
redis.call('EXPIRE', key, retention)
local data = {task_id = id, task_type = ty, tenant = tenant, state = 'running', attempt = tonumber(attempt),
  progress = tonumber(fraction), batch_id = batch or nil}
-- As inferq.schemas.sequence_of has it.
local attempts = math.min(tonumber(redrives or 0), 1e6) * 1000 + math.min(tonumber(attempt), 998)
data.sequence = attempts * 10000 + 1 + math.floor(tonumber(fraction) * 9996)
if note ~= '' then data.note = note end
publish(cjson.encode({type = 'task.progress', timestamp = timestamp, data = data}))
return 1
"""

_RETRYING = """
local attempt, redrives, failure, event = ARGV[10], ARGV[11], ARGV[12], ARGV[13]
local retries = order_of(redrives, attempt, RETRYING)
if conflict or retries <= order then return 0 end
if not known then create(ty, priority, batch, digest, created, 'retrying', retries, attempt) end
move('retrying', retries, attempt, redrives)
redis.call('HSET', key, 'e', failure)
redis.call('HDEL', key, 'l')
publish(event)
return 1
"""

_ENDED = """
local attempts, redrives, state, started, finished = ARGV[10], ARGV[11], ARGV[12], ARGV[13], ARGV[14]
local worker, failure, event, call = ARGV[15], ARGV[16], ARGV[17], ARGV[18]
local ends = state == 'succeeded' and SUCCEEDED + ENDED or order_of(redrives, MAX_ATTEMPT, ENDED)
if known and redis.call('HGET', key, 'k') == call then return 1 end
if conflict then return 0 end
if line ~= '' then
  -- A redrive that runs by now has a later order, and stays.
  if ends > order then
    redis.call('DEL', key)
    for _, zset in ipairs({everything, state_index('queued'), state_index('running'), state_index('retrying'),
        state_index('failed'), state_index('cancelled'), 'inferq:b:' .. tenant .. ':' .. batch}) do
      redis.call('ZREM', zset, id)
    end
  end
  -- Lines that the batch is not known to have are left to whoever feeds it: it looks at the object store.
  if tonumber(line) <= tonumber(redis.call('HGET', batch_key(batch), 'n') or 0) then
    if end_line(batch, line, state) == 0 then return 0 end
    keep_batch(batch)
  elseif not known then
    return 0
  end
  publish(event)
  return 1
end
if ends <= order then return 0 end
local attempt = tonumber(attempts) < 1 and '1' or attempts
if not known then create(ty, priority, batch, digest, created, state, ends, attempt) end
move(state, ends, attempt, redrives)
redis.call('HSET', key, 'f', finished, 'k', call)
if started ~= '' then redis.call('HSET', key, 'st', started) end
if worker ~= '' then redis.call('HSET', key, 'w', worker) end
redis.call('HDEL', key, 'e', 'l')
if failure ~= '' then redis.call('HSET', key, 'e', failure) end
if state == 'succeeded' then redis.call('HSET', key, 'g', '1') end
publish(event)
return 1
"""

_CANCEL = """
local order = redis.call('HGET', key, 'o')
if not order then return {} end
if tonumber(order) % 10 ~= ENDED then
  redis.call('HSET', key, 'x', '1')
  redis.call('EXPIRE', key, retention)
end
return redis.call('HGETALL', key)
"""

_LIST = """
local tenant, ty, state, batch, score, last = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local wanted, scan = tonumber(ARGV[7]), 500
local zset = 'inferq:l:' .. tenant
if batch ~= '' then zset = 'inferq:b:' .. tenant .. ':' .. batch
elseif state ~= '' and state ~= 'succeeded' then zset = 'inferq:s:' .. tenant .. ':' .. state end

local start = 0
if last ~= '' then
  -- The cursor's own entry may be gone: putting it back for a moment finds its place among equal times.
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
"""

SOURCES = {
    "submit": _RECORD + _TASK + _SUBMIT,
    "confirm": _RECORD + _TASK + _CONFIRM,
    "forget": _RECORD + _FORGET,
    "begin": _RECORD + _BEGUN + _TASK + _BEGIN,
    "released": _RECORD + _RELEASED,
    "progress": _RECORD + _PROGRESS,
    "retrying": _RECORD + _BEGUN + _TASK + _RETRYING,
    "ended": _RECORD + _BEGUN + _TASK + _ENDED,
    "cancel": _RECORD + _CANCEL,
    "list": _LIST,
}
"""Each script by its name."""
