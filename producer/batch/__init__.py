"""Submitting a batch: checks it and starts it. consumers/batches feeds it."""

from inferq.producer.batch.start import start

__all__ = ["start"]
