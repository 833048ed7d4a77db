if redis.call('GET', lease) == ARGV[5] then return redis.call('DEL', lease) end
return 0
