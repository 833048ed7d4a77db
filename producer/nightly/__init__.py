"""Nightly schedules: reads `schedules.toml`, and starts runs when they are due. consumers/nightly carries them out.

schedules  the file of schedules
beat       starts each run at its time
keda       cron triggers that start workers before a run
metrics    how many runs were due and started, for Prometheus
readiness  whether beat could start a run now
settings   the settings of beat
"""

from inferq.producer.nightly.schedules import SchedulesUnusable, read_schedules

__all__ = ["SchedulesUnusable", "read_schedules"]
