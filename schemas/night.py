"""A night of a nightly run, and the event that tells of it."""

from __future__ import annotations

from typing import Literal

from pydantic import AwareDatetime, Field

from inferq.schemas.batch import BatchEndState
from inferq.schemas.record import SCHEMA_VERSION, Record


class Night(Record):
    """One night of a run; `seconds` go from `began` on.

    `night` is the day on which its window opened; with `-end` behind it, what ended after that night was told
    and before the next one.
    """

    run_id: str
    schedule: str
    tenant: str
    night: str
    state: Literal["paused", BatchEndState]
    began: AwareDatetime
    until: AwareDatetime
    total: int | None = Field(None, description="Tasks of the whole run.")
    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0
    invalid: int = 0
    failures: dict[str, int] = Field({}, description="How many failed or were invalid, by error code.")
    seconds: float
    tasks_per_second: float
    pages: int | None = Field(None, description="Pages read, where the outputs have pages.")
    pages_per_second: float | None = None
    error: str | None = Field(None, description="Why the run itself failed.")

    @property
    def ended(self) -> int:
        return self.succeeded + self.failed + self.cancelled


class NightEvent(Record):
    """What a night came to, in the shape of a Standard Webhooks payload."""

    type: Literal["nightly.summary"]
    timestamp: AwareDatetime
    version: int = Field(SCHEMA_VERSION, ge=1, description="The version of this form; 1 if absent.")
    data: Night
