set_runs(bits(ARGV[5], batch), 6, #ARGV)
keep_batch(batch)
return 1
