"""The batches of a tenant in the order of their creation, newest first: an index in the object store.

batches/<tenant>/~times/<digits>/<digits>.<batch_id>   a batch; an empty object
batches/<tenant>/~complete                             every batch is in the index

The digits are those of 10^16 less the creation time in microseconds since 1970. So the keys sort by time, newest
first, and a page costs one listing as long as the page. The first five digits change about once a day, so that in a
local store no folder holds many. No batch id has a `~`.

Older versions record batches without this index. The first page of a tenant without `~complete` adds them.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from functools import partial
from itertools import islice
from typing import NamedTuple
from urllib.parse import unquote

from inferq.schemas import Batch, InferqError, Outage
from inferq.storage.objects.results import segment
from inferq.storage.objects.store import DEFAULT_TYPE, ObjectNotFound, ObjectStore, StoreOutage
from inferq.storage.status.fields import micros

_LAST = 10**16 - 1
_FOLDER_DIGITS = 5
_TIMES = "~times/"
_COMPLETE = "~complete"
_AFTER_ALL = "~~"
"""Sorts after every key of a tenant."""
_ALL = "batches/"
_ENTRY = re.compile(r"([0-9]{5})/([0-9]{11})\.(.+)")
_WRITERS = 8
_CHUNK = 8 * _WRITERS
"""Older batches added between two looks at whether to stop."""
_WAIT_SECONDS = 1.0
"""How long a page waits while another one of its tenant adds older batches."""

_log = logging.getLogger(__name__)

Load = Callable[[str, str], Batch | None]


class Created(NamedTuple):
    """When a batch was created, in microseconds since 1970, and its id."""

    at: int
    batch_id: str

    @classmethod
    def of(cls, batch_id: str, moment: datetime) -> Created:
        return cls(int(micros(moment)), batch_id)


class BatchTimes:
    """The index of all tenants. Every method may raise StoreOutage."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._begun: set[str] = set()
        self._completing: dict[str, threading.Lock] = {}
        self._closing = threading.Event()

    def close(self) -> None:
        """Add no more older batches: the next page of a tenant goes on, here or elsewhere."""
        self._closing.set()

    def begin(self, tenant: str) -> None:
        """Call it before the record of a batch is written: the index of a tenant without batches is complete."""
        if tenant in self._begun:
            return
        if not any(self._store.list(_base(tenant), limit=1)):
            self._set_complete(tenant)
        self._begun.add(tenant)

    def add(self, tenant: str, batch_id: str, created_at: datetime) -> None:
        """Add a batch whose record is written. Adding it again changes nothing."""
        name = _name(Created.of(batch_id, created_at))
        self._store.create(_base(tenant) + _TIMES + name, b"", content_type=DEFAULT_TYPE)

    def newest(self, tenant: str, *, before: Created | None, limit: int, load: Load) -> list[Created]:
        """The newest batches that are older than `before`, at most `limit`. `load` reads a batch's record."""
        self._complete(tenant, load)
        return self.listed(tenant, before=before, limit=limit)

    def listed(self, tenant: str, *, before: Created | None = None, limit: int) -> list[Created]:
        """As `newest`, but only what the index has: it adds no older batches, and writes nothing."""
        times = _base(tenant) + _TIMES
        after = times + _name(before) if before is not None else ""
        infos = self._store.list(times, start_after=after, limit=limit)
        return [entry for info in infos if (entry := _read(info.key.removeprefix(times))) is not None]

    def tenants(self) -> Iterator[str]:
        """The tenants that have batches. Each costs one listing of one object."""
        key = ""
        while (first := next(self._store.list(_ALL, start_after=key, limit=1), None)) is not None:
            folder = first.key.removeprefix(_ALL).partition("/")[0]
            yield unquote(folder)
            key = f"{_ALL}{folder}/{_AFTER_ALL}"

    def _complete(self, tenant: str, load: Load) -> None:
        """Add the batches that an older version recorded; once for each tenant."""
        if self._is_complete(tenant):
            return
        completing = self._completing.setdefault(tenant, threading.Lock())
        if not completing.acquire(timeout=_WAIT_SECONDS):
            raise StoreOutage("the list of batches is being made for the first time; try again in a minute")
        try:
            if self._is_complete(tenant):
                return
            missing = self._missing(tenant)
            if missing:
                _log.info("tenant %s: adding %d batches to its list", tenant, len(missing))
            remaining = iter(missing)
            with ThreadPoolExecutor(_WRITERS) as threads:
                while chunk := list(islice(remaining, _CHUNK)):
                    self._go_on()
                    for _ in threads.map(partial(self._add_older, tenant, load), chunk):
                        pass
            self._set_complete(tenant)
        finally:
            completing.release()

    def _go_on(self) -> None:
        if self._closing.is_set():
            raise StoreOutage("the list of batches is not complete, and this process stops; try again")

    def _missing(self, tenant: str) -> set[str]:
        """The ids of recorded batches that the index lacks, from a listing of every object of every batch."""
        base = _base(tenant)
        missing: set[str] = set()
        for info in self._store.list(base):
            self._go_on()
            folder, _, name = info.key.removeprefix(base).partition("/")
            if name == "batch.json":
                missing.add(unquote(folder))
            elif f"{folder}/" == _TIMES and (entry := _read(name)) is not None:
                missing.discard(entry.batch_id)  # listed after all batches: "~" sorts after every letter
        return missing

    def _add_older(self, tenant: str, load: Load, batch_id: str) -> None:
        try:
            batch = load(tenant, batch_id)
        except Outage:
            raise
        except InferqError as error:
            _log.warning("batch %s of tenant %s is missing in lists: %s", batch_id, tenant, error)
            return
        if batch is not None:
            self.add(tenant, batch_id, batch.created_at)

    def _is_complete(self, tenant: str) -> bool:
        try:
            self._store.get(_base(tenant) + _COMPLETE)
        except ObjectNotFound:
            return False
        return True

    def _set_complete(self, tenant: str) -> None:
        self._store.create(_base(tenant) + _COMPLETE, b"", content_type=DEFAULT_TYPE)


def _base(tenant: str) -> str:
    return f"{_ALL}{segment(tenant)}/"


def _name(entry: Created) -> str:
    digits = f"{min(max(_LAST - entry.at, 0), _LAST):016}"
    return f"{digits[:_FOLDER_DIGITS]}/{digits[_FOLDER_DIGITS:]}.{entry.batch_id}"


def _read(name: str) -> Created | None:
    """The entry of that name; None for an object that is none."""
    match = _ENTRY.fullmatch(name)
    if match is None:
        return None
    folder, rest, batch_id = match.groups()
    return Created(_LAST - int(folder + rest), batch_id)
