"""The state of each batch's lines, in Redis: one bitmap per state. Redis may lose it.

The feeder then rebuilds it from the object store; until then `look` returns None.
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
"""The result of taking a batch's lease. `held`: another slice has it and may be dead. `outdated`: a later slice of
the same chain has begun. `another`: another chain feeds the batch."""


@dataclass(frozen=True)
class Stall:
    """When the batch last made progress (Unix seconds), and how many tasks had ended.

    `asked`: how many seconds the stall had lasted at the last recount. `fed_again`: the same for when lost lines
    were last fed again.
    """

    ended: int
    since: float
    asked: float = 0.0
    fed_again: float = 0.0


@dataclass(frozen=True)
class Standing:
    """A batch in the index. `line` and `offset` (bytes) are the end of the processed part of its source.

    No line after `high_water` is fed. `known`: whether the counts are correct. `leased`: whether a feeder has the
    lease. `rate` is in tasks per second. `stall` is the feeder's last note.
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
    """The reply to a feeder's step: the counts of lines, and whether to stop."""

    cancel_requested: bool
    fed: int
    ended: int
    invalid: int

    @property
    def in_flight(self) -> int:
        return self.fed - self.ended


class IndexLost(Exception):
    """Redis has lost the batch; rebuild the index."""


class LeaseLost(Exception):
    """Another feeder has the batch's lease."""


class BatchIndex:
    """The lines of batches. Safe from many threads; any method may raise StatusOutage.

    `lease_seconds`: how long a silent feeder keeps its lease.
    """

    def __init__(self, status: StatusIndex, *, lease_seconds: int = 20) -> None:
        self._status = status
        self._lease = lease_seconds
        self._scripts = {name: status.script(source) for name, source in scripts.SOURCES.items()}

    def take(self, tenant: str, batch_id: str, *, chain: str, part: int, token: str) -> Taking:
        """Take the lease of a batch; each `step` renews it.

        `chain` names a feeding from start to end; `part` numbers its slices.
        """
        taking: Taking = self._run("take", tenant, batch_id, [chain, part, token, self._lease])
        return taking

    def release(self, tenant: str, batch_id: str, token: str) -> None:
        self._run("release", tenant, batch_id, [token])

    def open(
        self, tenant: str, batch_id: str, *, token: str, line: int, offset: int, total: int, cancelled: bool
    ) -> None:
        """Declare the bitmaps correct up to `line`. Raises LeaseLost without changing anything."""
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
        """Mark lines as fed and as invalid, and all lines up to `line` as processed. Announce that lines up to
        `high_water` may be fed next.

        Raises IndexLost (the lease is still renewed) and LeaseLost, without marking anything.
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
        _, cancel, all_fed, succeeded, failed, cancelled, all_invalid, _ = reply
        return Step(bool(cancel), all_fed, succeeded + failed + cancelled, all_invalid)

    def ends(self, tenant: str, batch_id: str, state: EndState, lines: Sequence[int]) -> None:
        """Mark lines as ended, as found in the object store."""
        self._run("ends", tenant, batch_id, [state, *lines])

    def processed(self, tenant: str, batch_id: str, first: int, last: int) -> frozenset[int]:
        """The lines from `first` to `last` that are already fed or invalid."""
        return frozenset(self._run("processed", tenant, batch_id, [first, last]))

    def unended(self, tenant: str, batch_id: str, *, after: int = 0, limit: int = 1000) -> list[int]:
        """Fed lines after `after` that have not ended, in order; about `limit` of them."""
        found: list[int] = self._run("unended", tenant, batch_id, [after, limit])
        return found

    def forget(self, tenant: str, batch_id: str, *, high_water: int, token: str = "") -> None:
        """Delete the bitmaps to rebuild them. Ends of lines up to `high_water` are marked from now on.

        With a `token`, raises LeaseLost without changing anything if another feeder has the lease.
        """
        if self._run("forget", tenant, batch_id, [high_water, token]) < 0:
            raise LeaseLost

    def mark(
        self, tenant: str, batch_id: str, state: Literal["fed", "invalid", "cached"], lines: Iterable[int]
    ) -> None:
        """Mark lines: before `open`, or as answered by the result cache."""
        self._run("mark", tenant, batch_id, [state, *_runs(lines)])

    def set_state(self, tenant: str, batch_id: str, state: BatchState, error: str | None = None) -> None:
        self._set(tenant, batch_id, {"s": state, "e": clean(error or "")})

    def request_cancel(self, tenant: str, batch_id: str, *, line: int | None = None) -> None:
        """Cancel the batch or one line: queued tasks never start, running ones stop."""
        self._set(tenant, batch_id, {"x" if line is None else f"x:{line}": "1"})

    def note_stall(self, tenant: str, batch_id: str, stall: Stall) -> None:
        """Record a stall for the next slice."""
        # Apart, because the previous version reads three numbers.
        note = {"q": f"{stall.ended} {stall.since} {stall.asked}", "fa": str(stall.fed_again)}
        self._set(tenant, batch_id, note)

    def is_fed(self, tenant: str, batch_id: str, line: int) -> bool:
        return line in self.processed(tenant, batch_id, line, line)

    def look(self, tenant: str, batch_id: str) -> Standing | None:
        """The batch in the index; None if it is unknown."""
        record, leased, *numbers = self._run("look", tenant, batch_id, [])
        if not record:
            return None
        fields = dict(zip(record[::2], record[1::2], strict=True))
        running, fed, succeeded, failed, cancelled, invalid, cached = numbers or [0] * 7
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
                cached=min(cached, succeeded),
            ),
            rate=_rate(fields.get("before") or fields.get("then"), ended),
            stall=_read_stall(fields.get("q"), fields.get("fa")),
        )

    def states(self, names: Sequence[tuple[str, str]]) -> list[BatchState | None]:
        """The state of each batch, given by tenant and id; None if Redis knows none."""
        commands = [("HGET", batch_key(tenant, batch_id), "s") for tenant, batch_id in names]
        return [state or None for state in self._status.read(*commands)]

    def unfed(self, names: Sequence[tuple[str, str]]) -> list[int | None]:
        """How many lines of each batch, given by tenant and id, are still to be fed; None if Redis knows it not."""
        keys = [batch_key(tenant, batch_id) for tenant, batch_id in names]
        found = self._status.read(*(("HGET", key, field) for key in keys for field in ("t", "l")))
        return [
            max(0, int(total) - int(line)) if total and line else None
            for total, line in zip(found[::2], found[1::2], strict=True)
        ]

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

        self._status.write(both)


def _rate(sample: str | None, ended: int) -> float | None:
    if not sample:
        return None
    at, before = sample.split()
    seconds = (int(micros(datetime.now(UTC))) - int(at)) / 1e6
    return max(0.0, ended - int(before)) / seconds if seconds > 0.1 else None


def _read_stall(noted: str | None, fed_again: str | None) -> Stall | None:
    if not noted:
        return None
    ended, since, asked = noted.split()
    return Stall(int(ended), float(since), float(asked), float(fed_again or 0))


def _runs(lines: Iterable[int]) -> list[int]:
    """The first and last line of each run of consecutive lines."""
    ends: list[int] = []
    for line in lines:
        if ends and line == ends[-1] + 1:
            ends[-1] = line
        else:
            ends += (line, line)
    return ends


def _text(number: int | None) -> str:
    return "" if number is None else str(number)
