"""/healthz, /readyz and /metrics of a process that serves no other HTTP; inferq.schemas.probe_server answers.

settings  where it listens
registry  the metrics of the process that runs the light jobs
"""
