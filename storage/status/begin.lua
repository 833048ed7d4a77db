local attempt, redrives, worker, started, event = ARGV[10], ARGV[11], ARGV[12], ARGV[13], ARGV[14]
local run, silence, repeats = ARGV[15], tonumber(ARGV[16]), ARGV[17] == '1'
local work, work_seconds, work_silence = ARGV[18], ARGV[19], tonumber(ARGV[20])
local begins = order_of(redrives, attempt, RUNNING)
local lost, other = -1, ''
-- After the end of the task nothing runs: the object store has the end as well.
local ended = begins < order and order % 10 == ENDED
-- A later attempt or redrive is on record: its message exists, unless a queue was purged.
local past = not repeats and not conflict and begins < order and not ended
if not conflict and not ended then other = lease_of_another(run, silence) end
local earlier_redrive = math.floor(begins / 1e6) < math.floor(order / 1e6)
local begins_now = not conflict and not ended and not past and not earlier_redrive and other == ''
local same = -1
if begins_now and work ~= '' then
  same = same_work(work, run, work_silence)
  begins_now = same < 0
end
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
  note_trace()
  if begins > order then publish(event) end
end
if begins_now then
  renew(run)
  if work ~= '' then compute_work(work, run, work_seconds) end
end
local state, cancel = unpack(redis.call('HMGET', key, 's', 'x'))
if batch ~= '' then
  local whole, own = unpack(redis.call('HMGET', batch_key(batch), 'x', 'x:' .. line))
  cancel = cancel or whole or (line ~= '' and own)
end
return {known or '', cancel and 1 or 0, state, lost, other, past and 1 or 0, same}
