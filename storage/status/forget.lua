local known, order, score, batch = unpack(redis.call('HMGET', key, 'd', 'o', 'i', 'b'))
if not known or known ~= ARGV[5] or tonumber(order) % 10 ~= 0 then return 0 end
redis.call('DEL', key)
redis.call('ZREM', everything, id)
redis.call('ZREM', state_index('queued'), id)
if batch then redis.call('ZREM', 'inferq:b:' .. tenant .. ':' .. batch, id) end
return 1
