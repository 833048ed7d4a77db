"""Where the lines of each batch stand, in Redis: a bitmap per state. Fast, but not the truth: it may be lost.

Whoever feeds a batch makes it anew from the object store where it was lost; until then `look` gives None.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import redis

from inferq.schemas import BatchCounts, BatchState, EndState
from inferq.schemas.encoding import clean
from inferq.storage.batches import scripts
from inferq.storage.status.fields import micros
from inferq.storage.status.index import StatusIndex
from inferq.storage.status.keys import batch_key

Taking = Literal["taken", "held", "outdated", "another"]
"""What became of an attempt to take a batch's lease: `held` by somebody, perhaps a dead one; `outdated`, as a
later slice of the same feeding has begun; or `another` feeding of it is alive."""


@dataclass(frozen=True)
class Stall:
    """Since when no task of a batch has ended, in POSIX seconds; `ended` tasks had by then.

    `asked`: how many seconds it had lasted when the object store was last asked for ends.
    """

    ended: int
    since: float
    asked: float = 0.0


@dataclass(frozen=True)
class Standing:
    """A batch as the index has it. `line` and `offset` (bytes) say how far its source has been dealt with.

    No line beyond `reaches` is fed. `known`: whether the counts are right. `leased`: a feeder has it at this
    moment. `rate` is in tasks per second. `lull` is what a feeder noted last.
    """

    known: bool
    leased: bool
    state: BatchState | None
    error: str | None
    cancel_requested: bool
    line: int
    offset: int
    high_water: int
    counts: BatchCounts
    rate: float | None
    stall: Stall | None


@dataclass(frozen=True)
class Step:
    """What a feeder learns with each step: how many lines are where, and whether to stop."""

    cancel_requested: bool
    fed: int
    ended: int
    invalid: int

    @property
    def in_flight(self) -> int:
        return self.fed - self.ended


class IndexLost(Exception):
    """Redis has forgotten the batch, so that the index has to be made anew."""


class LeaseLost(Exception):
    """Another feeder has taken the batch over."""


class BatchIndex:
    """The lines of batches. Safe to use from many threads; any method may raise StatusOutage.

    `lease_seconds`: how long a feeder that says nothing more keeps its batch.
    """

    def __init__(self, status: StatusIndex, *, lease_seconds: int = 20) -> None:
        self._status = status
        self._lease = lease_seconds
        self._scripts = {name: status.script(source) for name, source in scripts.SOURCES.items()}

    def take(self, tenant: str, batch_id: str, *, chain: str, part: int, token: str) -> Taking:
        """Take the lease on feeding a batch, for some seconds; each `step` renews it.

        `chain` names a feeding from its start to its end, `part` counts its slices.
        """
        taking: Taking = self._run("take", tenant, batch_id, [chain, part, token, self._lease])
        return taking

    def release(self, tenant: str, batch_id: str, token: str) -> None:
        self._run("release", tenant, batch_id, [token])

    def open(
        self, tenant: str, batch_id: str, *, token: str, line: int, offset: int, total: int, cancelled: bool
    ) -> None:
        """The bitmaps are right, up to `line`. Raises LeaseLost, and then has changed nothing."""
        if self._run("open", tenant, batch_id, [line, offset, total, int(cancelled), token]) < 0:
            raise LeaseLost

    def step(
        self,
        tenant: str,
        batch_id: str,
        *,
        token: str,
        high_water: int | None = None,
        line: int | None = None,
        offset: int = 0,
        fed: Iterable[int] = (),
        invalid: Iterable[int] = (),
    ) -> Step:
        """Mark lines as fed and as invalid, all up to `line` being dealt with. What comes next is no line
        beyond `reaches`.

        Raises IndexLost (the lease is renewed all the same) and LeaseLost, and then has marked nothing.
        """
        new = _runs(fed)
        reply = self._run(
            "step", tenant, batch_id,
            [token, self._lease, _text(high_water), _text(line), offset, len(new), *new, *_runs(invalid)],
        )  # fmt: skip
        match reply:
            case [0]:
                raise IndexLost
            case [-1]:
                raise LeaseLost
        _, cancel, all_fed, succeeded, failed, cancelled, all_invalid = reply
        return Step(bool(cancel), all_fed, succeeded + failed + cancelled, all_invalid)

    def ends(self, tenant: str, batch_id: str, state: EndState, lines: Sequence[int]) -> None:
        """These lines have ended, as the object store says."""
        self._run("ends", tenant, batch_id, [state, *lines])

    def processed(self, tenant: str, batch_id: str, first: int, last: int) -> frozenset[int]:
        """Which lines, from `first` to `last`, are fed or invalid already."""
        return frozenset(self._run("processed", tenant, batch_id, [first, last]))

    def unended(self, tenant: str, batch_id: str, *, after: int = 0, limit: int = 1000) -> list[int]:
        """Lines behind `after` that are fed and have not ended: about `limit` at most, in order."""
        found: list[int] = self._run("unended", tenant, batch_id, [after, limit])
        return found

    def forget(self, tenant: str, batch_id: str, *, high_water: int, token: str = "") -> None:
        """Throw the bitmaps away, to make them anew; ends of lines up to `reaches` are marked from now on.

        With a `token`, raises LeaseLost where another feeder has the batch, and then has changed nothing.
        """
        if self._run("forget", tenant, batch_id, [high_water, token]) < 0:
            raise LeaseLost

    def mark(
        self, tenant: str, batch_id: str, state: Literal["fed", "invalid"], lines: Iterable[int]
    ) -> None:
        """Mark lines, before the index is open."""
        self._run("mark", tenant, batch_id, [state, *_runs(lines)])

    def set_state(self, tenant: str, batch_id: str, state: BatchState, error: str | None = None) -> None:
        self._set(tenant, batch_id, {"s": state, "e": clean(error or "")})

    def request_cancel(self, tenant: str, batch_id: str, *, line: int | None = None) -> None:
        """Have the batch, or one line of it, cancelled: nothing of it starts, and what runs stops."""
        self._set(tenant, batch_id, {"x" if line is None else f"x:{line}": "1"})

    def note_stall(self, tenant: str, batch_id: str, stall: Stall) -> None:
        """Keep for the next slice how long nothing has ended."""
        self._set(tenant, batch_id, {"q": f"{stall.ended} {stall.since} {stall.asked}"})

    def is_fed(self, tenant: str, batch_id: str, line: int) -> bool:
        return line in self.processed(tenant, batch_id, line, line)

    def look(self, tenant: str, batch_id: str) -> Standing | None:
        """Where a batch stands; None where nothing is known of it."""
        record, leased, *numbers = self._run("look", tenant, batch_id, [])
        if not record:
            return None
        fields = dict(zip(record[::2], record[1::2], strict=True))
        running, fed, succeeded, failed, cancelled, invalid = numbers or [0] * 6
        ended = succeeded + failed + cancelled
        return Standing(
            known=bool(numbers),
            leased=bool(leased),
            state=fields.get("s") or None,
            error=fields.get("e") or None,
            cancel_requested="x" in fields,
            line=int(fields.get("l", 0)),
            offset=int(fields.get("o", 0)),
            high_water=int(fields.get("n", 0)),
            counts=BatchCounts(
                total=int(fields["t"]) if "t" in fields else None,
                queued=max(0, fed - ended),
                running=min(running, max(0, fed - ended)),
                succeeded=succeeded,
                failed=failed,
                cancelled=cancelled,
                invalid=invalid,
            ),
            rate=_rate(fields.get("before") or fields.get("then"), ended),
            stall=_read_stall(fields.get("q")),
        )

    def _run(self, name: str, tenant: str, batch_id: str, arguments: Sequence[Any]) -> Any:
        key = batch_key(tenant, batch_id)
        now = micros(datetime.now(UTC))
        return self._scripts[name]([key], [tenant, batch_id, self._status.retention, now, *arguments])

    def _set(self, tenant: str, batch_id: str, fields: Mapping[str, str]) -> None:
        key = batch_key(tenant, batch_id)

        def both(connection: redis.Redis) -> None:
            with connection.pipeline() as pipeline:
                pipeline.hset(key, items=[part for pair in fields.items() for part in pair])
                pipeline.expire(key, self._status.retention)
                pipeline.execute()

        self._status.ask(both)


def _rate(sample: str | None, ended: int) -> float | None:
    if not sample:
        return None
    at, before = sample.split()
    seconds = (int(micros(datetime.now(UTC))) - int(at)) / 1e6
    return max(0.0, ended - int(before)) / seconds if seconds > 0.1 else None


def _read_stall(noted: str | None) -> Stall | None:
    if not noted:
        return None
    ended, since, asked = noted.split()
    return Stall(int(ended), float(since), float(asked))


def _runs(lines: Iterable[int]) -> list[int]:
    """The first and last of each run of lines that follow each other."""
    ends: list[int] = []
    for line in lines:
        if ends and line == ends[-1] + 1:
            ends[-1] = line
        else:
            ends += (line, line)
    return ends


def _text(number: int | None) -> str:
    return "" if number is None else str(number)
