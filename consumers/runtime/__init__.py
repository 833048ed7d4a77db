"""Engine processes: starting one, talking to it, and ending it.

process        the worker's end of an engine process
child          the engine process itself
messages       what goes over the pipe between the two
device_memory  GPU memory in use, as a metric
"""
