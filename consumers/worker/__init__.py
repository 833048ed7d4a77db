"""The worker: takes tasks from its queues, has them computed, and records how each one ended.

worker             the process: its slots, signals, probes
slot               a slot's threads, each of which consumes deliveries and brings them to their end
task_run           one delivery from its arrival to its acknowledgement: the story
task_group         several deliveries of one lane, together
attempt            one attempt of its task: decided, computed, recorded, or failed
decision           run, retry, dead-letter, …: pure functions from facts to a decision
preparation        the facts before a run, early fetching, and the record that it begins
computation        fetching a task's inputs, computing it, and when to stop
records            the results, failures, retries and dead letters that a delivery leaves behind
endings            puts an end on record, once, and reports it
attempt_report     what the log, the trace and the metrics say of an attempt
track_figures      how the attempts of a track ended, for the registry
refusal            messages that are no task, and deliveries that fail unexpectedly
notifier           a task's callbacks, handed over to the queue that delivers them
engine_supervisor  a slot's engine process between tasks, and the leases by which one task holds it
batch_limit        how many tasks an engine computes together, after memory ran out
engine_clock       what the engine's seconds go to: computing, or waiting for what
loaded_engines     at most so many engines are loaded: the least recently used one makes room
waiting_line       first come, first served
services           what all slots share, and how an unavailable service is waited for
inputs, scratch    input files, and the folder for them
result_cache       answers computed before
lease_renewer      renews the leases of runs whose threads are in a blocking call
heartbeat          reports the worker to the registry in Redis
metrics, settings, cli
"""
