"""The records of batches in the object store, which is the truth about them.

batches/<tenant>/<batch_id>/batch.json      the request, written once
batches/<tenant>/<batch_id>/source.json     the JSONL to feed and its number of lines, written once
batches/<tenant>/<batch_id>/input/<token>   a source that was listed or copied
batches/<tenant>/<batch_id>/cancel.json     a request to cancel it
batches/<tenant>/<batch_id>/output.jsonl    the results of tasks that succeeded, in line order
batches/<tenant>/<batch_id>/errors.jsonl    failed, cancelled and invalid lines, in line order
batches/<tenant>/<batch_id>/summary.json    how it ended, written once, after the two
batches/<tenant>/~times/                    the batches by time (inferq.storage.batches.times)
"""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ValidationError

from inferq.schemas import Batch, BatchSummary, InferqError, Record, describe_faults
from inferq.schemas.encoding import to_json
from inferq.storage.batches.times import BatchTimes, Created
from inferq.storage.objects.results import segment
from inferq.storage.objects.store import ObjectNotFound, ObjectStore, vanished

M = TypeVar("M", bound=BaseModel)

_JSON = "application/json"
_BATCH = "batch.json"


class BatchConflict(InferqError):
    """The id belongs to a batch with another content."""

    code = "id_conflict"


class UnreadableBatch(InferqError):
    """A batch's record cannot be read."""

    code = "batch_unreadable"


class RecordMissing(InferqError):
    """The object store has no record of a batch that a message is about."""

    code = "batch_missing"


class BatchSource(Record):
    """The JSONL that a batch is fed from. `lines` counts all lines, `blank` those without content.

    `own_ids`: whether some lines name task ids. `taken` is the key of a list of lines whose id an earlier line has,
    each with that line.
    """

    key: str
    gzip: bool = False
    lines: int
    blank: int = 0
    taken: str | None = None
    own_ids: bool = False

    @property
    def total(self) -> int:
        return self.lines - self.blank


class _Cancelled(BaseModel):
    wanted: bool = True


class BatchStore:
    """The records of all batches. Every method may raise StoreOutage and UnreadableBatch."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._times = BatchTimes(store)

    def close(self) -> None:
        """Stop what takes long: adding the batches of an older version to a list."""
        self._times.close()

    def begin(self, tenant: str) -> None:
        """Call it before anything of a tenant's first batch is stored. `create` does."""
        self._times.begin(tenant)

    def create(self, batch: Batch) -> Batch:
        """Record a batch and return the record, which may be that of the same batch, recorded earlier.

        Raises BatchConflict if the id belongs to another batch.
        """
        self.begin(batch.tenant)
        kept = self._once(_place(batch.tenant, batch.batch_id) + _BATCH, batch)
        if not kept.same_as(batch):
            raise BatchConflict(
                f"batch {batch.batch_id!r} was submitted before with another content; choose another id"
            )
        self.enlist(kept)
        return kept

    def enlist(self, batch: Batch) -> None:
        """Add a recorded batch to the tenant's list. `create` does; older versions do not."""
        self._times.add(batch.tenant, batch.batch_id, batch.created_at)

    def load(self, tenant: str, batch_id: str) -> Batch | None:
        return self._load(_place(tenant, batch_id) + _BATCH, Batch)

    def newest(self, tenant: str, *, before: Created | None = None, limit: int) -> list[Created]:
        """The newest of the tenant's batches, at most `limit`, without reading them.

        `before` is the last of the page before. A batch that was deleted may still be named, and one that was
        submitted again since also with its earlier time.
        """
        return self._times.newest(tenant, before=before, limit=limit, load=self.load)

    def source(self, tenant: str, batch_id: str) -> BatchSource | None:
        return self._load(_place(tenant, batch_id) + "source.json", BatchSource)

    def keep_source(self, tenant: str, batch_id: str, source: BatchSource) -> BatchSource:
        """Record the JSONL to feed. The first record counts; returns it."""
        return self._once(_place(tenant, batch_id) + "source.json", source)

    def request_cancel(self, tenant: str, batch_id: str) -> None:
        self._once(_place(tenant, batch_id) + "cancel.json", _Cancelled())

    def cancel_requested(self, tenant: str, batch_id: str) -> bool:
        return self._load(_place(tenant, batch_id) + "cancel.json", _Cancelled) is not None

    def summary(self, tenant: str, batch_id: str) -> BatchSummary | None:
        """How the batch ended; None before."""
        return self._load(_place(tenant, batch_id) + "summary.json", BatchSummary)

    def finish(self, summary: BatchSummary) -> BatchSummary:
        """Record how a batch ended. The first record counts; returns it."""
        return self._once(_place(summary.tenant, summary.batch_id) + "summary.json", summary)

    def _once(self, key: str, model: M) -> M:
        if self._store.create(key, to_json(model).encode(), content_type=_JSON):
            return model
        kept = self._load(key, type(model))
        if kept is None:
            raise vanished(self._store, key)
        return kept

    def _load(self, key: str, model: type[M]) -> M | None:
        try:
            # A user's batch is read strictly, one that a newer gateway put on record is not.
            return model.model_validate_json(self._store.get(key), extra="allow")
        except ObjectNotFound:
            return None
        except ValidationError as error:
            raise UnreadableBatch(
                f"this version cannot read the record {self._store.location(key)}: "
                + "; ".join(describe_faults(error)[:3])
            ) from error


def output_key(tenant: str, batch_id: str) -> str:
    """The key of `output.jsonl`."""
    return _place(tenant, batch_id) + "output.jsonl"


def errors_key(tenant: str, batch_id: str) -> str:
    """The key of `errors.jsonl`."""
    return _place(tenant, batch_id) + "errors.jsonl"


def input_key(tenant: str, batch_id: str, token: str) -> str:
    """The key of a listed or copied source, or of the list of its duplicate ids."""
    return f"{_place(tenant, batch_id)}input/{token}"


def _place(tenant: str, batch_id: str) -> str:
    return f"batches/{segment(tenant)}/{segment(batch_id)}/"
