"""The worker's settings that the engine process reads itself."""

from __future__ import annotations

from pydantic import Field

from inferq.schemas import Settings


class EngineProcessSettings(Settings):
    """How an engine process starts."""

    warmup: int = Field(
        1,
        ge=0,
        le=100,
        description="Runs on generated input before an engine takes its first task. The worker is ready only "
        "after them.",
    )
