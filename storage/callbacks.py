"""The records of callbacks: an index in Redis, and in the object store those that were given up.

    tasks/<tenant>/<task_id>/callbacks/<callback_id>.json       (batches/… for a batch's)

Redis holds a hash of records per task or batch (`inferq:c:<tenant>:<kind>:<id>`), without bodies, and the
newest failures of a tenant (`inferq:cf:<tenant>`) and of all (`inferq:cf`); these may be lost. A callback that was
given up is kept with its body until it is delivered.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from inferq.schemas import Callback, CallbackRecord, SubjectKind
from inferq.schemas.encoding import to_json
from inferq.storage.lua import read_lua
from inferq.storage.objects.results import segment
from inferq.storage.objects.store import ObjectNotFound, ObjectStore
from inferq.storage.status.index import StatusIndex

MAX_LISTED = 500
"""The most failures that one listing holds."""

ALL_FAILURES = "inferq:cf"
"""The sorted set of all tenants' failures, for counting them."""

_MOST_FAILURES = 10_000
_MOST_RECORDS = 300
"""After this many records of a task or batch, callbacks of its progress are not listed any more."""

_EVERY = 1_000_000_000

_SAVE = read_lua(Path(__file__))


class CallbackRecords:
    """The records of callbacks. Methods that ask Redis may raise StatusOutage, the others StoreOutage."""

    def __init__(self, store: ObjectStore, index: StatusIndex) -> None:
        self._store = store
        self._index = index
        self._save = index.script(_SAVE)

    def note(self, record: CallbackRecord) -> None:
        """Put a record into the index in place of the earlier one.

        A delivered record stays, unless the callback was resent since; a record of a later resend stays, too.
        """
        own = _key(record.tenant, record.subject_kind, record.subject_id)
        keys = [own, _failures(record.tenant), ALL_FAILURES]
        text = to_json(record.model_copy(update={"body": None}))
        member = f"{record.subject_kind}:{record.subject_id}:{record.callback_id}"
        moment = record.updated_at.timestamp()
        self._save(
            keys,
            [
                record.callback_id,
                record.state,
                text,
                member,
                moment,
                self._index.retention,
                _MOST_FAILURES,
                _MOST_RECORDS if record.event == "task.progress" else _EVERY,
                _moment(record.resent_at),
                record.tenant,
            ],
        )

    def keep(self, record: CallbackRecord) -> None:
        """Keep a callback that was given up, with its body, in the object store."""
        place = _place(record.tenant, record.subject_kind, record.subject_id)
        self._store.put(
            f"{place}{record.callback_id}.json", to_json(record).encode(), content_type="application/json"
        )

    def drop(self, record: CallbackRecord) -> None:
        """Delete the record of a callback that was given up: it was delivered."""
        place = _place(record.tenant, record.subject_kind, record.subject_id)
        self._store.delete(f"{place}{record.callback_id}.json")

    def known(self, callback: Callback) -> CallbackRecord | None:
        """The index's record of a callback."""
        key = _key(callback.tenant, callback.subject_kind, callback.subject_id)
        (text,) = self._index.read(("HGET", key, callback.callback_id))
        return _read(text) if text is not None else None

    def indexed(
        self, tenant: str, kind: SubjectKind, subject_id: str, only: str | None = None
    ) -> tuple[CallbackRecord, ...]:
        """The index's records of a task's or batch's callbacks; with `only`, of the callback with that id."""
        key = _key(tenant, kind, subject_id)
        (texts,) = self._index.read(("HVALS", key) if only is None else ("HMGET", key, only))
        return tuple(record for text in texts if text is not None and (record := _read(text)) is not None)

    def kept(
        self, tenant: str, kind: SubjectKind, subject_id: str, only: str | None = None
    ) -> tuple[CallbackRecord, ...]:
        """The callbacks of a task or batch that were given up, from the object store; `only` as in `indexed`."""
        place = _place(tenant, kind, subject_id)
        found = []
        for info in self._store.list(place if only is None else f"{place}{only}.json"):
            try:
                record = _read(self._store.get(info.key))
            except ObjectNotFound:  # delivered meanwhile
                continue
            if record is not None:
                found.append(record)
        return tuple(found)

    def failures(self, tenant: str, *, limit: int = 50) -> tuple[CallbackRecord, ...]:
        """The tenant's failures in the index, newest first."""

        newest = min(max(limit, 1), MAX_LISTED) - 1
        (members,) = self._index.read(("ZREVRANGE", _failures(tenant), 0, newest))
        commands = []
        for member in members:
            kind, _, rest = member.partition(":")
            subject_id, _, callback_id = rest.rpartition(":")
            commands.append(("HGET", _key(tenant, kind, subject_id), callback_id))
        records = (_read(text) for text in self._index.read(*commands) if text is not None)
        return tuple(record for record in records if record is not None and record.state == "failed")


def _moment(at: datetime | None) -> str:
    """The time as in the record's JSON, without the Z: such texts sort by time."""
    return at.astimezone(UTC).isoformat().removesuffix("+00:00") if at is not None else ""


def _read(text: str | bytes) -> CallbackRecord | None:
    try:
        return CallbackRecord.model_validate_json(text)
    except ValidationError:
        return None  # written by another version


def _key(tenant: str, kind: str, subject_id: str) -> str:
    return f"inferq:c:{tenant}:{kind}:{subject_id}"


def _failures(tenant: str) -> str:
    return f"inferq:cf:{tenant}"


def _place(tenant: str, kind: SubjectKind, subject_id: str) -> str:
    folder = "tasks" if kind == "task" else "batches"
    return f"{folder}/{segment(tenant)}/{segment(subject_id)}/callbacks/"
