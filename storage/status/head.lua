local QUEUED, RUNNING, RETRYING, ENDED = 1, 2, 3, 4
local MAX_ATTEMPT, SUCCEEDED = 99999, 8e15
local DAY = 86400e6

local function order_of(redrives, attempt, rank)
  return math.min(tonumber(redrives), 1e9) * 1e6 + math.min(tonumber(attempt), MAX_ATTEMPT) * 10 + rank
end

local function number(value)
  return string.format('%.0f', value)
end

local key = KEYS[1]
local tenant, id, retention, now = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
