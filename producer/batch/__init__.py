"""Submitting a batch: whether it can work, and its start. consumers/batches feeds it."""

from inferq.producer.batch.start import start

__all__ = ["start"]
