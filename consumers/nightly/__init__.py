"""Starts nightly runs and reports what each night came to. producer/nightly has the beat that triggers them.

start    from a schedule and a time to a batch
listing  which objects of a prefix are new since the run before
night    what a night came to, and the callback that reports it
jobs     the jobs `nightly.start` and `nightly.watch`
"""
