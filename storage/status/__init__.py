"""The status index in Redis: the state of each task. Redis may lose it; the object store is the truth.

index          every call on it, from these five:
submissions    a task is submitted, confirmed or forgotten
runs           a run begins, makes progress, is retried or ends
cancels        a cancel is requested, also of a task without a record
lookup         one task's status, and a tenant's tasks
usage          what tenants used, by type and day
script_calls   a call of one of its scripts
command_group  commands that travel to Redis together
connection     the connection to Redis, and its outages
keys           its keys in Redis
fields         a task's fields as Redis keeps them
scripts        its Lua scripts, joined from the .lua files here
"""
