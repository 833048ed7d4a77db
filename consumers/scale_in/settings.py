"""The settings of the scale-in guard."""

from __future__ import annotations

from pydantic import Field

from inferq.consumers.probes.settings import ProbeSettings


class ScaleInSettings(ProbeSettings):
    """How the scale-in guard works."""

    scale_in_interval: float = Field(
        0.25,
        gt=0,
        le=60,
        description="Seconds between two readings of the workers' heartbeats by `inferq scale-in-guard`.",
    )
    scale_in_namespace: str | None = Field(
        None,
        description="The namespace of the workers' pods (default: that of the scale-in guard's own pod).",
    )
