-- A write that changes nothing, as the key never exists. A Redis that refuses writes (READONLY, OOM, MISCONF,
-- NOREPLICAS) refuses this one too, so it never answers from old data.
redis.call('SET', 'inferq:writable', '1', 'XX')
