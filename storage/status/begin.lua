local attempt, redrives, worker, started, event = ARGV[10], ARGV[11], ARGV[12], ARGV[13], ARGV[14]
local run, silence = ARGV[15], tonumber(ARGV[16])
local begins = order_of(redrives, attempt, RUNNING)
local lost, other = -1, ''
-- After the end of the task, or of this redrive, nothing runs: the object store has the end as well.
local over = begins < order and (order % 10 == ENDED or math.floor(begins / 1e6) < math.floor(order / 1e6))
local may_run = not conflict and not over
if may_run then other = lease_of_another(run, silence) end
local begins_now = may_run and other == ''
if begins_now and begins >= order then
  local runs = 1
  if begins == order then
    -- The attempt began before and has not ended or been retried since: an orphaned run.
    local before, last = string.match(redis.call('HGET', key, 'l') or '0 ', '^(%d+) (.*)$')
    runs = tonumber(before) + (last == run and 0 or 1)
  end
  lost = runs - 1
  if not known then
    -- A task without a creation time was created before its start at the latest.
    if created == '' then created = number(math.min(now, tonumber(started))) end
    create(ty, priority, batch, digest, created, 'running', begins, attempt)
  end
  move('running', begins, attempt, redrives)
  redis.call('HSET', key, 'w', worker, 'st', started, 'l', number(runs) .. ' ' .. run)
  redis.call('HDEL', key, 'g', 'n', 'e')
  if begins > order then publish(event) end
end
if begins_now then renew(run) end
local state, cancel = unpack(redis.call('HMGET', key, 's', 'x'))
if batch ~= '' then
  local whole, own = unpack(redis.call('HMGET', batch_key(batch), 'x', 'x:' .. line))
  cancel = cancel or whole or (line ~= '' and own)
end
return {known or '', cancel and 1 or 0, state, lost, other}
