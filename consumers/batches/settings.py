"""How batches are fed, and their results put together."""

from __future__ import annotations

from pydantic import Field

from inferq.schemas import Settings


class BatchSettings(Settings):
    """How batches are fed, and their results put together."""

    batch_slice: float = Field(
        60.0,
        gt=0,
        le=600,
        description="Seconds that a feeder works on a batch before it yields to other batches.",
    )
    batch_lease: int = Field(20, ge=1, le=600, description="Seconds after which a silent feeder is replaced.")
    batch_doubt: float = Field(
        10.0,
        gt=0,
        description="Seconds without an ended task after which a batch's tasks in flight are looked up in "
        "the object store, since Redis may have missed their ends; then again at growing intervals.",
    )
    batch_readers: int = Field(
        8, ge=1, le=64, description="Results read from the object store at a time, for each batch."
    )
