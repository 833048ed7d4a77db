-- Sets the bits of runs of lines: ARGV has first line, last line, and so on, from `at` to `last`.
-- One command for many lines, because each command in a script costs as much as a call of the script, and an
-- entry in Redis's append-only file.
local function set_runs(key, at, last)
  for i = at, last, 2 do
    local bit, final = tonumber(ARGV[i]) - 1, tonumber(ARGV[i + 1]) - 1
    while bit % 8 ~= 0 and bit <= final do
      redis.call('SETBIT', key, bit, 1)
      bit = bit + 1
    end
    local bytes = math.floor((final + 1 - bit) / 8)
    if bytes > 0 then
      redis.call('SETRANGE', key, bit / 8, string.rep('\255', bytes))
      bit = bit + 8 * bytes
    end
    for rest = bit, final do redis.call('SETBIT', key, rest, 1) end
  end
end
