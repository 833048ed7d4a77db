"""Starts nightly runs and reports each night. producer/nightly has the beat that triggers them.

start    from a schedule and a time to a batch
listing  which objects of a prefix are new since the previous run
night    the summary of a night, and the callback that reports it
jobs     the jobs `nightly.start` and `nightly.watch`
"""
