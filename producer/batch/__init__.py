"""Submits a batch. consumers/batches feeds it.

checks  what is known to be wrong before the source is read
start   records the batch once, and publishes the job that feeds it
"""

from inferq.producer.batch.start import start

__all__ = ["start"]
