local tenant, batch, retention, now = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
