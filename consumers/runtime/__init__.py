"""Engine processes: starting one, talking to it, and ending it.

process        the worker's end of an engine process
start          starts engine processes, the first one before the worker imports anything else
runs           what a run calls, and how it ends without an answer
group          a group of jobs that is computed in batches, as the worker sees it
child          the engine process itself
computing      computes one task, or the tasks of a group in batches
channel        messages over a socket, each with a deadline
messages       what goes over the channel
output         what it prints and logs, line by line in the worker's log
memory         the memory of an engine process, against its limits
process_tree   ends an engine process with everything that it started
gpus           how busy and how full the GPUs are, as metrics
settings       the settings that the engine process reads itself
"""
