local key = KEYS[1]
local lease = 'inferq:lease:' .. tenant .. ':' .. batch
