if conflict then return -1 end
if not known then
  create(ty, priority, batch, digest, created, 'queued', order_of(0, 1, QUEUED), 1)
  note_trace()
elseif order % 10 == 0 then
  redis.call('HSET', key, 'o', number(order + QUEUED))
  redis.call('EXPIRE', key, retention)
else
  return 0
end
publish(ARGV[10])
return 1
