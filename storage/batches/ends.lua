local state = ARGV[5]
for i = 6, #ARGV do end_line(batch, ARGV[i], state) end
return 1
