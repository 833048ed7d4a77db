"""The settings of beat, which starts nightly runs."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from inferq.schemas import Settings


class NightlySettings(Settings):
    """The file of schedules, and the address of beat's probes."""

    schedules_file: Path = Field(
        Path(".inferq/schedules.toml"),
        description="The file of schedules; `inferq beat` starts their runs.",
    )
    probe_host: str = Field(
        "127.0.0.1", description="Address of /healthz, /readyz and /metrics; 0.0.0.0 in a container."
    )
    probe_port: int | None = Field(
        None, ge=0, le=65535, description="Port of /healthz, /readyz and /metrics (default: not served)."
    )
