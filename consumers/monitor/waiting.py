"""How long the first message of a queue has waited, from counts alone.

RabbitMQ does not report how long a message has waited. Reading the first message (basic.get, then a requeue) counts as
a delivery: a quorum queue marks the message as redelivered and counts it towards the delivery limit, and a worker then
looks for orphaned runs. So the age comes from two counts: the messages in the queue, which RabbitMQ reports, and the
deliveries that workers took. The queue is first in, first out, so the last arrivals are those that still wait.
"""

from __future__ import annotations

from collections import deque

from pydantic import BaseModel

MOST_ARRIVALS = 200
"""The most arrivals that are kept apart: an age of a day is then right to a few hundredths."""


class Arrivals(BaseModel):
    """What is known of one queue after a look, for the next monitor. `arrivals`: when, and how many messages.

    `reach` is the highest sum of messages in the queue and deliveries taken; it counts all arrivals.
    """

    arrivals: list[tuple[float, int]]
    reach: int
    taken: int


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

    def known(self) -> Arrivals | None:
        """What the next monitor needs; None before the first look."""
        if self._reach is None:
            return None
        return Arrivals(arrivals=list(self._arrivals), reach=self._reach, taken=self._taken)

    def look(self, now: float, ready: int, taken: int) -> float:
        """Seconds for which the first message has been seen waiting; 0 without one.

        `now` is in seconds. `ready`: messages in the queue. `taken`: deliveries that workers took so far; it may lag,
        and begins anew if Redis loses it.
        """
        if self._reach is None or ready == 0:
            self._arrivals.clear()
            self._reach = taken
        elif taken < self._taken:
            self._reach -= self._taken - taken
        self._taken = taken
        arrived = ready + taken
        if arrived > self._reach:
            self._arrivals.append((now, arrived - self._reach))
            self._reach = arrived
        self._settle(now, ready)
        return max(0.0, now - self._arrivals[0][0]) if self._arrivals else 0.0

    def _settle(self, now: float, ready: int) -> None:
        """Let the oldest messages go until as many are left as the queue holds."""
        surplus = sum(count for _, count in self._arrivals) - ready
        while surplus > 0:
            at, count = self._arrivals.popleft()
            if count > surplus:
                self._arrivals.appendleft((at, count - surplus))
            surplus -= min(count, surplus)
        if surplus < 0 and self._reach is not None:
            # Arrivals hidden by messages that left uncounted, or whose count lags: it will not count these again.
            self._arrivals.append((now, -surplus))
            self._reach -= surplus
        if len(self._arrivals) > MOST_ARRIVALS:
            self._join(now)

    def _join(self, now: float) -> None:
        """Count the messages of one arrival with the next: where that leaves the smallest gap, for its age."""
        times = [at for at, _ in self._arrivals]
        gaps = [(after - before) / (now - after + 1) for before, after in zip(times, times[2:], strict=False)]
        joined = 1 + gaps.index(min(gaps))
        at, count = self._arrivals[joined + 1]
        self._arrivals[joined + 1] = at, count + self._arrivals[joined][1]
        del self._arrivals[joined]
