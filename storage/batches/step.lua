local token, seconds, high_water, line, offset = ARGV[5], ARGV[6], ARGV[7], ARGV[8], ARGV[9]
local fed = tonumber(ARGV[10])
local holder = redis.call('GET', lease)
if holder and holder ~= token then return {-1} end
-- Also before the index is open: rebuilding it may take longer than the lease.
redis.call('SET', lease, token, 'EX', seconds)
if redis.call('HEXISTS', key, 'open') == 0 then return {0} end
set_runs(bits('fed', batch), 11, 10 + fed)
set_runs(bits('invalid', batch), 11 + fed, #ARGV)
if line ~= '' then redis.call('HSET', key, 'l', line, 'o', offset) end
if high_water ~= '' then redis.call('HSET', key, 'n', high_water) end
keep_batch(batch)
local found = counts()
sample(found[2] + found[3] + found[4])
return {1, redis.call('HEXISTS', key, 'x'), unpack(found)}
