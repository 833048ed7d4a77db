"""A batch: many tasks from one source. Its request, status, summary, and the event of its end."""

from __future__ import annotations

import re
from typing import Annotated, Literal, get_args

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    StringConstraints,
    field_validator,
)

from inferq.schemas.record import SCHEMA_VERSION, Record
from inferq.schemas.s3_url import S3_BUCKET
from inferq.schemas.task import CallbackUrl, Priority, Tenant, TypeName
from inferq.schemas.window import Window

DEFAULT_IN_FLIGHT = 1000

BatchId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._:-]{1,116}$")]
"""Short enough for the ids of the tasks, `<batch_id>.<line>`."""

ScheduleName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]

RUN_ID = re.compile(r"[A-Za-z0-9_-]{1,64}-[0-9]{8}T[0-9]{6}Z")
"""The ids of nightly runs and their batches: the name of the schedule, and a time."""

BatchState = Literal[
    "preparing", "feeding", "paused", "running", "finishing", "completed", "cancelled", "failed"
]
BatchEndState = Literal["completed", "cancelled", "failed"]
BATCH_END_STATES: frozenset[BatchState] = frozenset(get_args(BatchEndState))
SOURCE_SCHEMES = ("inferq", "s3")

SET_BY_FEEDER = ("batch_id", "batch_line", "tenant")
"""Task fields that the lines and defaults of a batch cannot set."""

_NO_DEFAULTS = (*SET_BY_FEEDER, "task_id")

_SOURCE = rf"^(inferq:.+|s3://{S3_BUCKET.replace('a-z', 'A-Za-z')}(/.*)?$)"
"""What sources look like, as JSON Schema. Checks in code explain what is wrong with an S3 URL."""


class Batch(BaseModel):
    """The request for a batch: its source, and the common fields of its tasks.

    Each line of the source is a JSON object of task fields. They override the defaults; `options` and
    `metadata` are merged. Each object under an `s3://bucket/prefix` is a task of `task_type`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    batch_id: BatchId
    tenant: Tenant = "default"
    source: str = Field(
        pattern=rf"^({'|'.join(SOURCE_SCHEMES)}):.+",
        max_length=2048,
        json_schema_extra={"pattern": _SOURCE},
        description="`inferq:` (an uploaded JSONL file, perhaps gzipped), `s3://bucket/file.jsonl`, or "
        "`s3://bucket/prefix`, each of whose objects is an input.",
    )
    source_sha256: str | None = Field(
        None, description="SHA-256 of an uploaded source. The same content is the same source."
    )
    task_type: TypeName | None = Field(None, description="The type of the lines that name none.")
    defaults: dict[str, JsonValue] = Field(
        {},
        description="Task fields that a line may override.",
        json_schema_extra={"propertyNames": {"not": {"enum": [*_NO_DEFAULTS]}}},
    )
    priority: Priority = "normal"
    max_in_flight: int = Field(
        DEFAULT_IN_FLIGHT, ge=1, le=1_000_000, description="The most tasks that are fed and have not ended."
    )
    callback_url: CallbackUrl | None = Field(None, description="The URL to notify of the end of the batch.")
    window: Window | None = Field(None, description="The hours in which it is fed; all if absent.")
    schedule: ScheduleName | None = Field(
        None, description="The schedule of a nightly run; only nightly runs have one."
    )
    metadata: dict[str, JsonValue] = Field({}, description="Repeated in the status, summary and callback.")
    created_at: AwareDatetime

    @field_validator("defaults")
    @classmethod
    def _leaves_to_the_feeder(cls, value: dict[str, JsonValue]) -> dict[str, JsonValue]:
        for name in _NO_DEFAULTS:
            if name in value:
                raise ValueError(f"{name} cannot be a default: it differs by line, or the batch says it")
        return value

    def same_as(self, other: Batch) -> bool:
        """Whether both request the same batch. The times of creation do not count."""
        ours, theirs = self._content(), other._content()
        if self.source_sha256 and self.source_sha256 == other.source_sha256:
            del ours["source"], theirs["source"]
        return ours == theirs

    def _content(self) -> dict[str, JsonValue]:
        return self.model_dump(mode="json", exclude={"created_at"})

    def task_id(self, line: int) -> str:
        """The task id for a line without one. Lines count from 1."""
        return f"{self.batch_id}.{line}"


_CACHED = "How many of those that succeeded were answered by the result cache."


class CountsNow(Record):
    """The number of lines of a batch in each state. A count is None while it is counted again.

    `total` is None until the source has been read once.
    """

    total: int | None = None
    queued: int | None = Field(None, description="Fed, and not ended: running ones included.")
    running: int | None = None
    succeeded: int | None = None
    failed: int | None = None
    cancelled: int | None = None
    invalid: int | None = None
    cached: int | None = Field(None, description=_CACHED)

    @property
    def done(self) -> int | None:
        """The number of lines that have ended or are invalid."""
        parts = (self.succeeded, self.failed, self.cancelled, self.invalid)
        return None if None in parts else sum(part or 0 for part in parts)


class BatchCounts(CountsNow):
    """The number of lines of a batch in each state. `total` is None until the source has been read once."""

    queued: int = Field(0, description="Fed, and not ended: running ones included.")
    running: int = 0
    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0
    invalid: int = 0
    cached: int = Field(0, description=_CACHED)

    @property
    def ended(self) -> int:
        return self.succeeded + self.failed + self.cancelled


class BatchSummary(Record):
    """The record of the end of a batch, written once. `seconds` count from its creation."""

    batch_id: str
    tenant: str
    state: BatchEndState
    counts: BatchCounts
    failures: dict[str, int] = Field({}, description="The number of failed and invalid lines by error code.")
    error: str | None = Field(None, description="Why the batch itself failed.")
    seconds: float
    tasks_per_second: float
    pages: int | None = Field(None, description="Pages in the outputs, if they have pages.")
    pages_per_second: float | None = None
    schedule: str | None = None
    metadata: dict[str, JsonValue] = Field({})
    trace_id: str | None = Field(None, description="The trace of the batch; each line has one of its own.")
    created_at: AwareDatetime
    finished_at: AwareDatetime


class BatchEventData(BatchSummary):
    """The summary of a batch in its callback. Fields that are None are left out, except `error`."""

    truncated: tuple[Literal["metadata", "failures"], ...] = Field(
        (), description="Fields that were left out to keep the event small."
    )


class BatchEvent(Record):
    """The end of a batch, in the shape of a Standard Webhooks payload."""

    type: Literal["batch.completed", "batch.cancelled", "batch.failed"]
    timestamp: AwareDatetime
    version: int = Field(SCHEMA_VERSION, ge=1, description="The version of this form; 1 if absent.")
    data: BatchEventData


class BatchStatus(Record):
    """The status of a batch. `rate` is recent tasks per second; `seconds_left` is an estimate from it."""

    batch_id: str
    tenant: str
    state: BatchState
    source: str
    task_type: str | None = None
    priority: Priority = "normal"
    counts: CountsNow = BatchCounts()
    rate: float | None = None
    seconds_left: float | None = None
    cancel_requested: bool = False
    error: str | None = None
    schedule: str | None = None
    metadata: dict[str, JsonValue] = Field({})
    created_at: AwareDatetime
    finished_at: AwareDatetime | None = None

    @property
    def ended(self) -> bool:
        return self.state in BATCH_END_STATES
