"""The Lua scripts of the batches, and the shape of what Redis keeps of each: kilobytes for a million tasks.

A batch is a hash under `inferq:batch:<tenant>:<batch>`:
    open whether its bitmaps are right; whoever feeds it sets this, once it has made them so
    n no line beyond this one is fed    l o the last line that was dealt with, and where it ends (bytes)
    t total lines    s state    e why it failed    x cancel flag    x:<line> cancel flag of one line
    q `<ended> <since> <asked>`, for how long no task has ended
    chain slice which feeding of it is the present one
    then before the two latest samples of `<microseconds> <ended>`, for the rate
and a bitmap per state, `inferq:bits:<state>:<tenant>:<batch>` with the states fed, succeeded, failed,
cancelled and invalid; a line's bit is its number less one. `inferq:lease:<tenant>:<batch>` names its feeder.
"""

from __future__ import annotations


def batch_key(tenant: str, batch_id: str) -> str:
    return f"inferq:batch:{tenant}:{batch_id}"


def bits_key(state: str, tenant: str, batch_id: str) -> str:
    return f"inferq:bits:{state}:{tenant}:{batch_id}"


def lease_key(tenant: str, batch_id: str) -> str:
    return f"inferq:lease:{tenant}:{batch_id}"


LINES = """
local ENDS = {'succeeded', 'failed', 'cancelled'}

local function batch_key(batch) return 'inferq:batch:' .. tenant .. ':' .. batch end
local function bits(state, batch) return 'inferq:bits:' .. state .. ':' .. tenant .. ':' .. batch end

local function keep_batch(batch)
  for _, key in ipairs({batch_key(batch), bits('fed', batch), bits('succeeded', batch), bits('failed', batch),
      bits('cancelled', batch), bits('invalid', batch)}) do
    redis.call('EXPIRE', key, retention)
  end
end

-- Whether this moved the line: a success stands, everything else gives way to what is told later.
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
"""
"""What needs `tenant` and `retention`, and knows the lines of a batch."""

_HEAD = (
    """
local tenant, batch, retention, now = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
"""
    + LINES
    + """
local key = KEYS[1]
local lease = 'inferq:lease:' .. tenant .. ':' .. batch
"""
)

_RUNS = """
-- Sets the bits of lines that stand in ARGV from `at` to `last` as runs: first line, last line, and so on.
local function set_runs(key, at, last)
  for i = at, last, 2 do
    local bit, final = tonumber(ARGV[i]) - 1, tonumber(ARGV[i + 1]) - 1
    while bit % 8 ~= 0 and bit <= final do
      redis.call('SETBIT', key, bit, 1)
      bit = bit + 1
    end
    local bytes = math.floor((final + 1 - bit) / 8)
    if bytes > 0 then
      redis.call('SETRANGE', key, bit / 8, string.rep('\\255', bytes))
      bit = bit + 8 * bytes
    end
    for rest = bit, final do redis.call('SETBIT', key, rest, 1) end
  end
end
"""
"""One command for many lines: each command in a script costs as much as the script itself, and a line in
Redis's log of changes."""

_COUNTS = """
local function counts()
  local found = {}
  for _, state in ipairs({'fed', 'succeeded', 'failed', 'cancelled', 'invalid'}) do
    found[#found + 1] = redis.call('BITCOUNT', bits(state, batch))
  end
  return found
end

local function sample(ended)
  local latest = redis.call('HGET', key, 'then')
  local at = latest and tonumber(string.match(latest, '^(%d+)'))
  if not at or now - at >= 2e6 then
    if latest then redis.call('HSET', key, 'before', latest) end
    redis.call('HSET', key, 'then', string.format('%.0f %.0f', now, ended))
  end
end
"""

_TAKE = """
local chain, slice, token, seconds = ARGV[5], tonumber(ARGV[6]), ARGV[7], ARGV[8]
local known, reached = unpack(redis.call('HMGET', key, 'chain', 'slice'))
local holder = redis.call('GET', lease)
if known == chain and slice < tonumber(reached) then return 'outdated' end
if holder and holder ~= token then
  if known and known ~= chain then return 'another' end
  return 'held'
end
redis.call('SET', lease, token, 'EX', seconds)
redis.call('HSET', key, 'chain', chain, 'slice', slice)
redis.call('EXPIRE', key, retention)
return 'taken'
"""

_RELEASE = """
if redis.call('GET', lease) == ARGV[5] then return redis.call('DEL', lease) end
return 0
"""

_OPEN = """
local line, offset, total, cancelled, token = ARGV[5], ARGV[6], ARGV[7], ARGV[8], ARGV[9]
local holder = redis.call('GET', lease)
if holder and holder ~= token then return -1 end
redis.call('HSET', key, 'open', '1', 'n', line, 'l', line, 'o', offset, 't', total)
if cancelled == '1' then redis.call('HSET', key, 'x', '1') end
keep_batch(batch)
return 1
"""

_STEP = (
    _COUNTS
    + _RUNS
    + """
local token, seconds, reaches, line, offset = ARGV[5], ARGV[6], ARGV[7], ARGV[8], ARGV[9]
local fed = tonumber(ARGV[10])
local holder = redis.call('GET', lease)
if holder and holder ~= token then return {-1} end
-- Before the index is open, too: making it anew may take longer than the lease.
redis.call('SET', lease, token, 'EX', seconds)
if redis.call('HEXISTS', key, 'open') == 0 then return {0} end
set_runs(bits('fed', batch), 11, 10 + fed)
set_runs(bits('invalid', batch), 11 + fed, #ARGV)
if line ~= '' then redis.call('HSET', key, 'l', line, 'o', offset) end
if reaches ~= '' then redis.call('HSET', key, 'n', reaches) end
keep_batch(batch)
local found = counts()
sample(found[2] + found[3] + found[4])
return {1, redis.call('HEXISTS', key, 'x'), unpack(found)}
"""
)

_ENDS = """
local state = ARGV[5]
for i = 6, #ARGV do end_line(batch, ARGV[i], state) end
return 1
"""

_MARK = (
    _RUNS
    + """
set_runs(bits(ARGV[5], batch), 6, #ARGV)
keep_batch(batch)
return 1
"""
)

_LOOK = (
    _COUNTS
    + """
local leased = redis.call('EXISTS', lease)
if redis.call('HEXISTS', key, 'open') == 0 then return {redis.call('HGETALL', key), leased} end
local found = counts()
sample(found[2] + found[3] + found[4])
local running = redis.call('ZCARD', 'inferq:b:' .. tenant .. ':' .. batch)
return {redis.call('HGETALL', key), leased, running, unpack(found)}
"""
)

_DEALT_WITH = """
local found = {}
for line = tonumber(ARGV[5]), tonumber(ARGV[6]) do
  if redis.call('GETBIT', bits('fed', batch), line - 1) == 1
      or redis.call('GETBIT', bits('invalid', batch), line - 1) == 1 then found[#found + 1] = line end
end
return found
"""

_UNENDED = """
local after, limit = tonumber(ARGV[5]), tonumber(ARGV[6])
local open, found = bits('unended', batch), {}
redis.call('BITOP', 'OR', open, bits('succeeded', batch), bits('failed', batch), bits('cancelled', batch))
-- What has ended was fed, so that exclusive-or leaves what was fed and has not ended.
redis.call('BITOP', 'XOR', open, open, bits('fed', batch))
local byte = math.floor(after / 8)
while #found < limit do
  local first = redis.call('BITPOS', open, 1, byte)
  if first < 0 then break end
  byte = math.floor(first / 8) + 1
  for at = first, byte * 8 - 1 do
    if at >= after and redis.call('GETBIT', open, at) == 1 then found[#found + 1] = at + 1 end
  end
end
redis.call('DEL', open)
return found
"""

_FORGET = """
local holder = redis.call('GET', lease)
if holder and ARGV[6] ~= '' and holder ~= ARGV[6] then return -1 end
for _, state in ipairs({'fed', 'succeeded', 'failed', 'cancelled', 'invalid'}) do
  redis.call('DEL', bits(state, batch))
end
redis.call('HDEL', key, 'open', 'then', 'before')
redis.call('HSET', key, 'n', ARGV[5])
redis.call('EXPIRE', key, retention)
return 1
"""

SOURCES = {
    "take": _HEAD + _TAKE,
    "release": _HEAD + _RELEASE,
    "open": _HEAD + _OPEN,
    "step": _HEAD + _STEP,
    "ends": _HEAD + _ENDS,
    "mark": _HEAD + _MARK,
    "look": _HEAD + _LOOK,
    "dealt_with": _HEAD + _DEALT_WITH,
    "unended": _HEAD + _UNENDED,
    "forget": _HEAD + _FORGET,
}
"""Each script by its name."""
