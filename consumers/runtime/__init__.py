"""Engine processes: starting one, talking to it, and ending it.

process        the worker's end of an engine process
child          the engine process itself
channel        messages over a socket, each with a deadline
messages       what goes over the channel
output         what it prints and logs, line by line in the worker's log
memory         the memory of an engine process, against its limits
process_tree   ends an engine process with everything that it started
gpus           how busy and how full the GPUs are, as metrics
settings       the settings that the engine process reads itself
"""
