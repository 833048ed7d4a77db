"""`make chaos`: real processes, faults drawn from a seed, and a ledger that says what became of every task.

The ledger and its reckoning follow Jepsen's: what was confirmed is held against what came of it, into lost,
second results, repeated effects, recovered and unexpected (https://jepsen.io/analyses/rabbitmq).
"""
