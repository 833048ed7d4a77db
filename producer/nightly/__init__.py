"""Nightly schedules: reads `schedules.toml`, and starts runs when they are due. consumers/nightly carries them out."""

from inferq.producer.nightly.schedules import SchedulesUnusable, read_schedules

__all__ = ["SchedulesUnusable", "read_schedules"]
