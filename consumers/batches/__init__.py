"""Feeds batches and assembles their results.

feeder    feeding a batch, slice by slice, with a bounded number of tasks in flight
recount   how the lines of a batch stand, looked up in the object store
assembly  output.jsonl and errors.jsonl, once all lines have ended
jobs      the jobs `batches.feed` and `batches.assemble`
retry     how a job that cannot go on is sent again
"""
