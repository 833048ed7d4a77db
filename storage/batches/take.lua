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
