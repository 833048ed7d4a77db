local line, offset, total, cancelled, token = ARGV[5], ARGV[6], ARGV[7], ARGV[8], ARGV[9]
local holder = redis.call('GET', lease)
if holder and holder ~= token then return -1 end
redis.call('HSET', key, 'open', '1', 'n', line, 'l', line, 'o', offset, 't', total)
if cancelled == '1' then redis.call('HSET', key, 'x', '1') end
keep_batch(batch)
return 1
