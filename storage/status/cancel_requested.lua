local batch, line, run, running = ARGV[5], ARGV[6], ARGV[7], ARGV[8] == '1'
-- A run that checks is alive: renew its lease.
if holds(run) or (running and is_free()) then renew(run) end
if redis.call('HEXISTS', key, 'x') == 1 then return 1 end
if batch == '' then return 0 end
local whole, own = unpack(redis.call('HMGET', batch_key(batch), 'x', 'x:' .. line))
return (whole or (line ~= '' and own)) and 1 or 0
