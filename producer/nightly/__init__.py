"""Nightly schedules: read from `schedules.toml`, and started in time by beat. consumers/nightly runs them."""

from inferq.producer.nightly.schedules import SchedulesUnusable, read_schedules

__all__ = ["SchedulesUnusable", "read_schedules"]
