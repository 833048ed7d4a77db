local found = {}
for line = tonumber(ARGV[5]), tonumber(ARGV[6]) do
  if redis.call('GETBIT', bits('fed', batch), line - 1) == 1
      or redis.call('GETBIT', bits('invalid', batch), line - 1) == 1 then found[#found + 1] = line end
end
return found
