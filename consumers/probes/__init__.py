"""The probes of the worker and of the light jobs; inferq.schemas.probe_server answers them.

settings  the address that they listen on
registry  the metrics of the process that runs the light jobs
ends      tasks that ended, by their status and error code
children  the children of a labelled metric
"""
