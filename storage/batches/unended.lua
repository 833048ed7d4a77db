local after, limit = tonumber(ARGV[5]), tonumber(ARGV[6])
local open, found = bits('unended', batch), {}
redis.call('BITOP', 'OR', open, bits('succeeded', batch), bits('failed', batch), bits('cancelled', batch))
-- Every ended line was fed, so exclusive-or leaves the lines that were fed and have not ended.
redis.call('BITOP', 'XOR', open, open, bits('fed', batch))
local byte = math.floor(after / 8)
while #found < limit do
  local first = redis.call('BITPOS', open, 1, byte)
  if first < 0 then break end
  byte = math.floor(first / 8) + 1
  for at = first, byte * 8 - 1 do
    if at >= after and redis.call('GETBIT', open, at) == 1 then found[#found + 1] = at + 1 end
  end
end
redis.call('DEL', open)
return found
