local leased = redis.call('EXISTS', lease)
if redis.call('HEXISTS', key, 'open') == 0 then return {redis.call('HGETALL', key), leased} end
local found = counts()
sample(found[2] + found[3] + found[4])
local running = redis.call('ZCARD', 'inferq:b:' .. tenant .. ':' .. batch)
return {redis.call('HGETALL', key), leased, running, unpack(found)}
