-- Add counts to the current slice of time. ARGV: the prefix of the slices' keys, the seconds of a slice, the seconds that
-- it is kept, then pairs of a field and its number. The key follows from the clock of Redis.
local slice = math.floor(tonumber(redis.call('TIME')[1]) / tonumber(ARGV[2]))
local key = ARGV[1] .. string.format('%d', slice)
for at = 4, #ARGV, 2 do
  redis.call('HINCRBY', key, ARGV[at], ARGV[at + 1])
end
redis.call('EXPIRE', key, ARGV[3])
return 1
