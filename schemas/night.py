"""A night of a nightly run, and its event."""

from __future__ import annotations

from typing import Literal

from pydantic import AwareDatetime, Field

from inferq.schemas.batch import BatchEndState
from inferq.schemas.record import SCHEMA_VERSION, Record


class Night(Record):
    """One night of a run. `seconds` count from `began`.

    `night` is the day on which the window opened. With the suffix `-end` it counts the tasks that ended after
    the night was reported and before the next one.
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
    failures: dict[str, int] = Field({}, description="The number of failed and invalid tasks by error code.")
    seconds: float
    tasks_per_second: float
    pages: int | None = Field(None, description="Pages in the outputs, if they have pages.")
    pages_per_second: float | None = None
    error: str | None = Field(None, description="Why the run itself failed.")
    trace_id: str | None = Field(None, description="The trace of the run.")

    @property
    def ended(self) -> int:
        return self.succeeded + self.failed + self.cancelled


class NightEvent(Record):
    """The summary of a night, in the shape of a Standard Webhooks payload."""

    type: Literal["nightly.summary"]
    timestamp: AwareDatetime
    version: int = Field(SCHEMA_VERSION, ge=1, description="The version of this form; 1 if absent.")
    data: Night
