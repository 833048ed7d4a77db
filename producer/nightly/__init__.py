"""Nightly runs: batches that a schedule starts.

schedules   what is to run, read from `schedules.toml`
cron        when, as a pure function of time
runs        which runs there were, and what each of them took, in the object store
start       from a schedule and a time to a batch
beat        what starts them in time, on Celery beat
night       what a night came to, and the callback that tells of it
jobs        the jobs `nightly.start` and `nightly.watch`
"""

from inferq.producer.nightly.cron import Cron
from inferq.producer.nightly.schedules import Schedule, SchedulesUnusable, read_schedules, run_id_of

__all__ = ["Cron", "Schedule", "SchedulesUnusable", "read_schedules", "run_id_of"]
