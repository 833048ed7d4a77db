"""Feeds batches and assembles their results.

feeder      feeding a batch, slice by slice, with a bounded number of tasks in flight
chunks      lines published together, and marked once confirmed
tasks       the task in a line
lost_lines  lines without a result and without a message, fed again
recount     the state of a batch, recounted from the object store
assembly    output.jsonl and errors.jsonl, once all lines have ended
jobs        the jobs `batches.feed` and `batches.assemble`
retry       how a failed job is published again
services    the stores, index and publisher that all jobs of a process share
settings    how batches are fed, and their results assembled
"""
