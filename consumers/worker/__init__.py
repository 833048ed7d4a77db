"""The worker: takes tasks from its queues, has them computed, and records how each one ended.

worker             the process: slots, signals, readiness
slot               a slot's threads, each of which consumes and brings one delivery at a time to its end
task_run           one delivery from its arrival to its acknowledgement
decision           what to do next with a delivery: pure functions from facts to a decision
engine_supervisor  a slot's engine process between tasks, and the lease by which one task holds it
services           what all slots share, and how an unavailable service is waited for
inputs             fetching a task's input files
notifier           a task's callbacks, handed over to the queue that delivers them
result_cache       answers computed before
"""
