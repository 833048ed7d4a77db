local attempt, redrives, failure, event, run = ARGV[10], ARGV[11], ARGV[12], ARGV[13], ARGV[14]
local day, micros = ARGV[15], ARGV[16]
local retries = order_of(redrives, attempt, RETRYING)
if not conflict then release(run) end
if conflict or retries <= order then return 0 end
if not known then create(ty, priority, batch, digest, created, 'retrying', retries, attempt) end
move('retrying', retries, attempt, redrives)
redis.call('HSET', key, 'e', failure)
redis.call('HDEL', key, 'l', 'g', 'n')
count_usage(day, ty, 'retried', micros)
note_trace()
publish(event)
return 1
