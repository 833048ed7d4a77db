"""How often the monitor reads its figures."""

from __future__ import annotations

from pydantic import Field

from inferq.consumers.probes.settings import ProbeSettings


class MonitorSettings(ProbeSettings):
    """How often the monitor reads its figures."""

    monitor_interval: float = Field(
        5.0,
        ge=1,
        le=300,
        description="Seconds between two readings of queues and workers by `inferq monitor`.",
    )
    monitor_records_interval: float = Field(
        60.0,
        ge=1,
        le=3600,
        description="Seconds between two readings of batches and nightly runs by `inferq monitor`.",
    )
