"""Batches: sources read line by line, fed as tasks, and their results put together at the end."""

from inferq.producer.batch.start import feed_message, start

__all__ = ["feed_message", "start"]
