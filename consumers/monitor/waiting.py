"""How long the first message of a queue has waited, from counts alone.

RabbitMQ does not report how long a message has waited. Reading the first message (basic.get, then a requeue) counts as
a delivery: a quorum queue marks the message as redelivered and counts it towards the delivery limit, and a worker then
looks for orphaned runs. So the age comes from two counts: the messages in the queue, which RabbitMQ reports, and the
deliveries that workers took and did not requeue. The queue is first in, first out, so the last arrivals are those that
still wait. A requeued message returns to the front.
"""

from __future__ import annotations

from collections import deque

from pydantic import BaseModel

MOST_ARRIVALS = 200
"""The most arrivals that are kept apart: an age of a day is then right to a few hundredths."""


class Arrivals(BaseModel):
    """What is known of one queue after a look, for the next monitor. `arrivals`: when, and how many messages.

    `reach` is the highest sum of messages in the queue and deliveries taken and not requeued; it counts all arrivals.
    `left`: the arrivals that left the queue last.
    """

    arrivals: list[tuple[float, int]]
    reach: int
    taken: int
    requeued: int = 0
    left: list[tuple[float, int]] = []


class Waiting:
    """The messages of one queue by the time at which a look first saw them.

    What waits at the first look has arrived then, so the age may be too low. Messages that leave uncounted, as by a
    purge, count as the oldest. The age is too high if as many arrive in the same interval: do not look at a queue with
    consumers that count nothing, and begin a new one afterwards.
    """

    def __init__(self, known: Arrivals | None = None) -> None:
        self._arrivals: deque[tuple[float, int]] = deque(known.arrivals if known else ())
        self._reach = known.reach if known else None
        self._taken = known.taken if known else 0
        self._requeued = known.requeued if known else 0
        self._left: deque[tuple[float, int]] = deque(known.left if known else (), maxlen=MOST_ARRIVALS)
        self._looked: float | None = None

    def known(self) -> Arrivals | None:
        """What the next monitor needs; None before the first look."""
        if self._reach is None:
            return None
        return Arrivals(
            arrivals=list(self._arrivals),
            reach=self._reach,
            taken=self._taken,
            requeued=self._requeued,
            left=list(self._left),
        )

    def look(self, now: float, ready: int, taken: int, requeued: int = 0) -> float:
        """Seconds for which the first message has been seen waiting; 0 without one.

        `now` is in seconds. `ready`: messages in the queue. `taken` and `requeued`: deliveries that workers took, and
        requeued, so far; they may lag, and begin anew if Redis loses them.
        """
        if self._reach is None:
            self._reach = taken - requeued
        elif taken < self._taken or requeued < self._requeued:
            self._reach -= self._taken - self._requeued - (taken - requeued)
        else:
            self._put_back(requeued - self._requeued, before=ready + taken - self._taken)
        self._taken, self._requeued, self._looked = taken, requeued, now
        arrived = ready + taken - requeued
        if arrived > self._reach:
            self._arrivals.append((now, arrived - self._reach))
            self._reach = arrived
        self._settle(now, ready)
        if ready == 0:
            self._reach = arrived
        return max(0.0, now - self._arrivals[0][0]) if self._arrivals else 0.0

    def _put_back(self, count: int, *, before: int) -> None:
        """Return `count` messages to the front, those that left last. Then `before` messages waited."""
        returned = 0
        while returned < count and self._left:
            at, number = self._left.pop()
            again = min(number, count - returned)
            if again < number:
                self._left.append((at, number - again))
            self._arrivals.appendleft((at, again))
            returned += again
        surplus = min(returned, sum(number for _, number in self._arrivals) - before)
        while surplus > 0 and self._reach is not None and self._arrivals[-1][0] == self._looked:
            # The last look saw these before they were counted, and took them for arrivals.
            at, number = self._arrivals.pop()
            if number > surplus:
                self._arrivals.append((at, number - surplus))
            self._reach -= min(number, surplus)
            surplus -= min(number, surplus)

    def _settle(self, now: float, ready: int) -> None:
        """Let the oldest messages go until as many are left as the queue holds."""
        surplus = sum(count for _, count in self._arrivals) - ready
        while surplus > 0:
            at, count = self._arrivals.popleft()
            if count > surplus:
                self._arrivals.appendleft((at, count - surplus))
            self._left.append((at, min(count, surplus)))
            surplus -= min(count, surplus)
        if surplus < 0 and self._reach is not None:
            # Arrivals hidden by messages that left uncounted, or whose count lags: it will not count these again.
            self._arrivals.append((now, -surplus))
            self._reach -= surplus
        while len(self._arrivals) > MOST_ARRIVALS:
            self._join(now)

    def _join(self, now: float) -> None:
        """Count the messages of one arrival with the next: where that leaves the smallest gap, for its age."""
        times = [at for at, _ in self._arrivals]
        gaps = [(after - before) / (now - after + 1) for before, after in zip(times, times[2:], strict=False)]
        joined = 1 + gaps.index(min(gaps))
        at, count = self._arrivals[joined + 1]
        self._arrivals[joined + 1] = at, count + self._arrivals[joined][1]
        del self._arrivals[joined]
