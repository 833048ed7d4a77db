"""/healthz, /readyz and /metrics of a part that serves no HTTP otherwise.

server    the thread that answers
settings  where it listens
registry  the metrics of the process that works on light jobs
"""
