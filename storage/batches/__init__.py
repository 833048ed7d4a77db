"""What is kept of a batch, and its source line by line.

store    the records of batches in the object store
times    the batches of a tenant by time, in the object store
index    how many lines stand where, in Redis
scripts  the Lua scripts of the index
sources  from what a batch names as its source to the JSONL that it is fed from
lines    the lines of a JSONL, read in constant memory, and the tasks in them
"""
