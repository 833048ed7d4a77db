"""Where a process serves its probes."""

from __future__ import annotations

from pydantic import Field

from inferq.schemas import Settings


class ProbeSettings(Settings):
    """Where a process serves its probes."""

    probe_host: str = Field(
        "127.0.0.1", description="Address of /healthz, /readyz and /metrics; 0.0.0.0 in a container."
    )
    probe_port: int | None = Field(
        None, ge=0, le=65535, description="Port of /healthz, /readyz and /metrics (default: not served)."
    )
