local order = redis.call('HGET', key, 'o')
if not order then return {} end
if tonumber(order) % 10 ~= ENDED then
  redis.call('HSET', key, 'x', '1')
  redis.call('EXPIRE', key, retention)
end
return redis.call('HGETALL', key)
