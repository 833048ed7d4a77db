local order = redis.call('HGET', key, 'o')
if not order then
  redis.call('SET', cancelled_early, '1', 'EX', retention)
  return {}
end
if tonumber(order) % 10 ~= ENDED then
  redis.call('HSETNX', key, 'x', number(now))
  redis.call('EXPIRE', key, retention)
end
return redis.call('HGETALL', key)
