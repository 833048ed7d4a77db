local holder = redis.call('GET', lease)
if holder and ARGV[6] ~= '' and holder ~= ARGV[6] then return -1 end
for _, state in ipairs({'fed', 'succeeded', 'failed', 'cancelled', 'invalid', 'cached'}) do
  redis.call('DEL', bits(state, batch))
end
redis.call('HDEL', key, 'open', 'then', 'before')
redis.call('HSET', key, 'n', ARGV[5])
redis.call('EXPIRE', key, retention)
return 1
