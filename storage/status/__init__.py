"""The status index in Redis: where each task stands. It may be lost; the object store is the truth.

index    every call on it
keys     its keys in Redis
fields   a task's fields as Redis keeps them
scripts  its Lua scripts, put together from the .lua files here
"""
