"""Which runs a schedule had, in the object store: each in its place, and what it took.

nightly/<tenant>/<name>/known.json            since when the schedule is known, as it stands
nightly/<tenant>/<name>/places/<n>.json       the run that has this place; written once
nightly/<tenant>/<name>/runs/<run_id>.json    which place a run has
nightly/<tenant>/<name>/last.json             a place at which to begin to look for the last; a hint
nightly/<tenant>/<name>/taken/<run_id>.json   what the run took, settled once
nightly/<tenant>/<name>/seen/<token>.jsonl.gz every object that there was when it took them, with its ETag
nightly/<tenant>/<name>/nights/<run_id>/<day>.json   what a night came to

What is new is told against the run in the place before, which is settled first. So no two runs take the same
object, and none is left out, however many starters there are and wherever one of them is cut off.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar
from urllib.parse import unquote

from pydantic import AwareDatetime, BaseModel, ValidationError

from inferq.schemas import InferqError, Record
from inferq.schemas.encoding import to_json
from inferq.schemas.schedule import Schedule
from inferq.storage.objects.results import segment
from inferq.storage.objects.store import ObjectNotFound, ObjectStore

M = TypeVar("M", bound=BaseModel)

_JSON = "application/json"
_KNOWN = "known.json"
"""Sorts before all else that a schedule has."""


class UnreadableRun(InferqError):
    """What stands where a record of a nightly run should be is not one."""

    code = "run_unreadable"


class Run(Record):
    """A run as it was started first; a later start of the same one finds it so."""

    run_id: str
    scheduled_at: AwareDatetime
    schedule: Schedule


class Snapshot(Record):
    """What a run takes. `token` names its JSONL and its list of what there was; `objects` of it are new.

    `seen` is the token of the list that the next run goes by, for that source: this run's own, or where
    it could not or was not to tell what is new, that of the run before. `error` says why it took nothing.
    """

    token: str
    objects: int | None = None
    error: str | None = None
    seen: str | None = None
    seen_source: str | None = None


class Known(Record):
    """Since when a schedule is known with these times: what lies before was never missed."""

    cron: str
    time_zone: str
    since: AwareDatetime


class _Place(Record):
    place: int


def known_schedules(store: ObjectStore) -> Iterator[tuple[str, str]]:
    """Tenant and name of every schedule that is known. In one listing each, however many runs it had."""
    key = ""
    while (first := next(store.list("nightly/", start_after=key), None)) is not None:
        key = first.key
        match key.split("/"):
            case [_, tenant, name, *rest] if rest:
                if rest == [_KNOWN]:
                    yield unquote(tenant), name
                key = f"nightly/{tenant}/{name}/~"  # behind all that a schedule has


class RunLog:
    """The runs of one schedule. Every method may raise StoreOutage and UnreadableRun."""

    def __init__(self, store: ObjectStore, tenant: str, name: str) -> None:
        self._store = store
        self._folder = f"nightly/{segment(tenant)}/{name}/"

    def claim(self, run: Run) -> int:
        """The place of a run, which it has from now on if it had none. The first place is 0."""
        # The hint first: a starter that stalls here would else begin behind the place that another one took
        # for this run meanwhile, and give it a second.
        place = self._hint()
        known = self._load(f"runs/{run.run_id}.json", _Place)
        if known is not None:
            return known.place
        while not self._create(f"places/{place}.json", run):
            other = self.at(place).run_id
            if other == run.run_id:
                break  # another starter of the same run, or this one before it was cut off
            # Its starter may not have come to this, and would not find its place from behind the hint.
            self._put(f"runs/{other}.json", _Place(place=place))
            place += 1
        self._put(f"runs/{run.run_id}.json", _Place(place=place))
        self._put("last.json", _Place(place=place))
        return place

    def at(self, place: int) -> Run:
        """The run in a place that is taken."""
        found = self._load(f"places/{place}.json", Run)
        if found is None:
            raise UnreadableRun(f"{self._folder}places/{place}.json is gone: nothing may delete it")
        return found

    def last(self) -> Run | None:
        """The run in the last place."""
        place = self._hint()
        found = None
        while (run := self._load(f"places/{place}.json", Run)) is not None:
            found = run
            place += 1
        return found

    def has(self, run_id: str) -> bool:
        """Whether a start of this run has got as far as a place."""
        return self._load(f"runs/{run_id}.json", _Place) is not None

    def taken(self, run_id: str) -> Snapshot | None:
        return self._load(f"taken/{run_id}.json", Snapshot)

    def settle(self, run_id: str, taken: Snapshot) -> Snapshot:
        """Settle what a run takes; of several that were made at once the first one stands."""
        key = f"taken/{run_id}.json"
        return taken if self._create(key, taken) else self._load(key, Snapshot) or taken

    def seen_key(self, token: str) -> str:
        return f"{self._folder}seen/{token}.jsonl.gz"

    def known(self, now: AwareDatetime, schedule: Schedule) -> Known:
        """Since when the schedule is known with its present times: from now on, if it was not."""
        found = self._load(_KNOWN, Known)
        if found is not None and (found.cron, found.time_zone) == (schedule.cron, schedule.time_zone):
            return found
        made = Known(cron=schedule.cron, time_zone=schedule.time_zone, since=now)
        self._put(_KNOWN, made)
        return made

    def forget(self) -> None:
        """Be a schedule that was never known; its runs stay."""
        self._store.delete(f"{self._folder}{_KNOWN}")

    def keep_night(self, run_id: str, day: str, night: M) -> M:
        """Record what a night came to, and give the record that is kept: the first."""
        key = f"nights/{run_id}/{day}.json"
        return night if self._create(key, night) else self._load(key, type(night)) or night

    def nights(self, run_id: str, model: type[M]) -> list[M]:
        """What the nights of a run came to, in their order."""
        prefix = f"{self._folder}nights/{run_id}/"
        names = [info.key.removeprefix(self._folder) for info in self._store.list(prefix)]
        return [found for name in names if (found := self._load(name, model)) is not None]

    def _hint(self) -> int:
        hint = self._load("last.json", _Place)
        return 0 if hint is None else hint.place

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
                f"{self._store.location(key)} is not a record that this version can read: {error}"
            ) from error
