"""The status index in Redis: the state of each task. Redis may lose it; the object store is the truth.

index    every call on it
keys     its keys in Redis
fields   a task's fields as Redis keeps them
scripts  its Lua scripts, joined from the .lua files here
"""
