"""The runs of a schedule, in the object store: each has a place in their order, and a record of its objects.

nightly/<tenant>/<name>/known.json            since when the schedule has been known with its present times
nightly/<tenant>/<name>/places/<n>.json       the run at this place; written once
nightly/<tenant>/<name>/runs/<run_id>.json    the place of a run
nightly/<tenant>/<name>/last.json             a place from which to search for the last run; a hint
nightly/<tenant>/<name>/taken/<run_id>.json   the objects that the run took; written once
nightly/<tenant>/<name>/seen/<token>.jsonl.gz every object at that time, with its ETag
nightly/<tenant>/<name>/nights/<run_id>/<day>.json   the report of a night

A run takes the objects that are new since the run at the place before, which is settled first. So no two runs take
the same object, and no object is left out, with any number of starters and wherever one of them is killed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar
from urllib.parse import unquote

from pydantic import AwareDatetime, BaseModel, ValidationError

from inferq.schemas import InferqError, Record, describe_faults
from inferq.schemas.encoding import to_json
from inferq.schemas.schedule import Schedule
from inferq.storage.objects.results import segment
from inferq.storage.objects.store import ObjectNotFound, ObjectStore, vanished

M = TypeVar("M", bound=BaseModel)

_JSON = "application/json"
_KNOWN = "known.json"
"""Sorts before every other key of a schedule."""


class UnreadableRun(InferqError):
    """A record of a nightly run cannot be read."""

    code = "run_unreadable"


class Run(Record):
    """The record of a run's first start; later starts of the same run read it."""

    run_id: str
    scheduled_at: AwareDatetime
    schedule: Schedule


class Snapshot(Record):
    """The objects that a run takes. `token` names its JSONL and its list of all objects; `objects` counts the new ones.

    `seen` is the token of the list that the next run compares with, and `seen_source` its source: this run's own
    list, or that of the run before if this run took everything or failed. `error` says why it took nothing.
    """

    token: str
    objects: int | None = None
    error: str | None = None
    seen: str | None = None
    seen_source: str | None = None


class Known(Record):
    """Since when a schedule is known with these times; no run before that counts as missed."""

    cron: str
    time_zone: str
    since: AwareDatetime


class _Place(Record):
    place: int


def known_schedules(store: ObjectStore) -> Iterator[tuple[str, str]]:
    """Tenant and name of every known schedule. Each costs one listing, however many runs it had."""
    key = ""
    while (first := next(store.list("nightly/", start_after=key, limit=1), None)) is not None:
        key = first.key
        match key.split("/"):
            case [_, tenant, name, *rest] if rest:
                if rest == [_KNOWN]:
                    yield unquote(tenant), name
                key = f"nightly/{tenant}/{name}/~"  # after every key of the schedule


class RunLog:
    """The runs of one schedule. Every method may raise StoreOutage and UnreadableRun."""

    def __init__(self, store: ObjectStore, tenant: str, name: str) -> None:
        self._store = store
        self._folder = f"nightly/{segment(tenant)}/{name}/"

    def claim(self, run: Run) -> int:
        """The place of a run, which gets the next free one if it has none. The first place is 0."""
        # Read the hint first: otherwise a starter that stalls here could search from behind the place that
        # another starter took for this run meanwhile, and take a second one.
        place = self._hint()
        known = self._load(f"runs/{run.run_id}.json", _Place)
        if known is not None:
            return known.place
        while not self._create(f"places/{place}.json", run):
            other = self.at(place).run_id
            if other == run.run_id:
                break  # another starter of the same run, or an earlier try of this one
            # Its starter may have been killed before this, and would not find its place from behind the hint.
            self._put(f"runs/{other}.json", _Place(place=place))
            place += 1
        self._put(f"runs/{run.run_id}.json", _Place(place=place))
        self._put("last.json", _Place(place=place))
        return place

    def at(self, place: int) -> Run:
        """The run at a place that is taken."""
        found = self._load(f"places/{place}.json", Run)
        if found is None:
            raise UnreadableRun(f"{self._folder}places/{place}.json is missing: it must not be deleted")
        return found

    def last(self) -> Run | None:
        """The run at the last place."""
        place = self._hint()
        found = None
        while (run := self._load(f"places/{place}.json", Run)) is not None:
            found = run
            place += 1
        return found

    def has(self, run_id: str) -> bool:
        """Whether this run has a place."""
        return self._load(f"runs/{run_id}.json", _Place) is not None

    def taken(self, run_id: str) -> Snapshot | None:
        return self._load(f"taken/{run_id}.json", Snapshot)

    def settle(self, run_id: str, taken: Snapshot) -> Snapshot:
        """Record the objects of a run, and give the record that is kept: the first."""
        key = f"taken/{run_id}.json"
        return self._once(key, taken)

    def seen_key(self, token: str) -> str:
        return f"{self._folder}seen/{token}.jsonl.gz"

    def known(self, now: AwareDatetime, schedule: Schedule) -> Known:
        """Since when the schedule is known with its present times; from now on, if it was not."""
        found = self._load(_KNOWN, Known)
        if found is not None and (found.cron, found.time_zone) == (schedule.cron, schedule.time_zone):
            return found
        return self.know(now, schedule)

    def since(self) -> Known | None:
        """Since when the schedule is known, and its times; None if it was forgotten. Writes nothing."""
        return self._load(_KNOWN, Known)

    def know(self, now: AwareDatetime, schedule: Schedule) -> Known:
        """Record that the schedule is known from now on."""
        made = Known(cron=schedule.cron, time_zone=schedule.time_zone, since=now)
        self._put(_KNOWN, made)
        return made

    def forget(self) -> None:
        """Forget the schedule, as if it had never been known; its runs stay."""
        self._store.delete(f"{self._folder}{_KNOWN}")

    def keep_night(self, run_id: str, day: str, night: M) -> M:
        """Record the report of a night, and give the record that is kept: the first."""
        key = f"nights/{run_id}/{day}.json"
        return self._once(key, night)

    def nights(self, run_id: str, model: type[M]) -> list[M]:
        """The reports of a run's nights, in order."""
        prefix = f"{self._folder}nights/{run_id}/"
        names = [info.key.removeprefix(self._folder) for info in self._store.list(prefix)]
        return [found for name in names if (found := self._load(name, model)) is not None]

    def _hint(self) -> int:
        hint = self._load("last.json", _Place)
        return 0 if hint is None else hint.place

    def _once(self, name: str, record: M) -> M:
        if self._create(name, record):
            return record
        kept = self._load(name, type(record))
        if kept is None:
            raise vanished(self._store, self._folder + name)
        return kept

    def _create(self, name: str, record: BaseModel) -> bool:
        return self._store.create(self._folder + name, to_json(record).encode(), content_type=_JSON)

    def _put(self, name: str, record: BaseModel) -> None:
        self._store.put(self._folder + name, to_json(record).encode(), content_type=_JSON)

    def _load(self, name: str, model: type[M]) -> M | None:
        key = self._folder + name
        try:
            return model.model_validate_json(self._store.get(key))
        except ObjectNotFound:
            return None
        except ValidationError as error:
            raise UnreadableRun(
                f"{self._store.location(key)} is not a record that this version can read: "
                + "; ".join(describe_faults(error)[:3])
            ) from error
