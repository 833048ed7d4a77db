-- `inferq:flight:<tenant>:<work>` names the run that computes the work: when it began, its token and its task. The run
-- computes as long as it has its task's lease. After a failure the key says `failed` for a while: nobody waits then.
local function flight(work) return 'inferq:flight:' .. tenant .. ':' .. work end

-- For how many milliseconds the run of another task has computed the same work; -1 if none does.
local function same_work(work, run, silence)
  local since, holder, task = string.match(redis.call('GET', flight(work)) or '', '^(%d+) (%S+) (.*)$')
  if not since or task == id then return -1 end
  local lease = redis.call('HGET', 'inferq:t:' .. tenant .. ':' .. task, 'h') or ''
  local at, token = string.match(lease, '^(%d+) (.*)$')
  if token ~= holder then return -1 end
  local age = milliseconds() - tonumber(at)
  if age < 0 or age >= silence then return -1 end
  return math.max(0, milliseconds() - tonumber(since))
end

local function compute_work(work, run, seconds)
  if redis.call('GET', flight(work)) == 'failed' then return end
  redis.call('SET', flight(work), number(milliseconds()) .. ' ' .. run .. ' ' .. id, 'EX', seconds)
end
