"""Who may send to which target at a time, so that a dead or slow one never holds up another's callbacks.

A target is a scheme, host and port. What is over its limit does not wait here: it is told to come back later,
at a time of its own, and rests in the broker until then.
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

Target = tuple[str, str, int]

SHORTEST_DELAY = 1.0
LONGEST_DELAY = 300.0
"""Seconds that something over the limit is put aside for. No longer, as a dead target may be back by then."""

_NEW_LIMIT = 2
"""Places of a target that has not yet answered: enough to learn how it is, too few to do harm."""

_MOST_TARGETS = 10_000

_Standing = Literal["trusted", "new", "suspect"]


@dataclass
class _State:
    """What is known of a target: since when every sending has timed out, the seconds that one takes, and when
    the last one put aside is due."""

    standing: _Standing = "new"
    hangs_since: float | None = None
    busy: int = 0
    seconds: float = 0.2
    next_at: float = 0.0


@dataclass
class Targets:
    """The places of one process, `threads` in all. Safe from many threads.

    A target that answers has up to `limit` of them, and at most half of those that the others leave, so that
    the next one finds some; one that was never heard of has two; one that timed out the last time, or took
    longer than `slow` seconds, a single one. Suspects together have at most half of all places, and together
    with the new ones three quarters.
    """

    threads: int
    limit: int
    slow: float = math.inf
    clock: Callable[[], float] = time.monotonic
    chance: Callable[[], float] = random.random
    _states: dict[Target, _State] = field(default_factory=dict)
    _busy: Counter[_Standing] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def enter(self, target: Target) -> float | None:
        """Take a place, to be given back by `leave`: None. Else the seconds after which to come again."""
        with self._lock:
            state = self._states.get(target) or self._add(target)
            most = self._most(state)
            if state.busy < most:
                state.busy += 1
                self._busy[state.standing] += 1
                return None
            return self._delay(state)

    def hung(self, target: Target) -> float:
        """For how many seconds every sending to the target has timed out; 0 where the last one did not."""
        with self._lock:
            state = self._states.get(target)
            if state is None or state.hangs_since is None:
                return 0.0
            return self.clock() - state.hangs_since

    def leave(self, target: Target, seconds: float | None, *, timed_out: bool = False) -> None:
        """Give a place back after a sending that took so many seconds; None where nothing was sent."""
        with self._lock:
            state = self._states[target]
            if seconds is None:
                state.busy -= 1
                self._busy[state.standing] -= 1
                return
            suspect = timed_out or seconds > self.slow
            self._busy[state.standing] -= state.busy
            if state.standing == "suspect" and not suspect:
                # It is back: nobody needs to queue up behind what it was.
                state.next_at, state.seconds = 0.0, seconds
            state.standing = "suspect" if suspect else "trusted"
            if not timed_out:
                state.hangs_since = None
            elif state.hangs_since is None:
                state.hangs_since = self.clock()
            state.busy -= 1
            state.seconds = 0.7 * state.seconds + 0.3 * seconds
            self._busy[state.standing] += state.busy

    def _most(self, state: _State) -> int:
        """How many places the target may have now."""
        free = self.threads - self._busy.total()
        suspects = self._busy["suspect"]
        match state.standing:
            case "trusted":
                return min(self.limit, max(1, (state.busy + free) // 2)) if free else 0
            case "new":
                crowded = suspects + self._busy["new"] >= max(1, self.threads * 3 // 4)
                return 0 if crowded or not free else min(_NEW_LIMIT, self.limit)
            case "suspect":
                return 0 if suspects >= max(1, self.threads // 2) or not free else 1

    @property
    def busy(self) -> int:
        return self._busy.total()

    def _delay(self, state: _State) -> float:
        """A time of its own for each: as many seconds apart as the target needs for one."""
        now = self.clock()
        limit = {"trusted": self.limit, "new": _NEW_LIMIT, "suspect": 1}[state.standing]
        state.next_at = max(state.next_at, now + SHORTEST_DELAY) + state.seconds / limit
        if state.next_at - now > LONGEST_DELAY:
            # More than fit into the longest delay: those that follow are spread over its second half.
            state.next_at = now + LONGEST_DELAY
            return LONGEST_DELAY * (0.5 + self.chance() / 2)
        return state.next_at - now

    def _add(self, target: Target) -> _State:
        if len(self._states) >= _MOST_TARGETS:
            # The oldest that have nothing on their way; what is forgotten is only learnt anew.
            idle = [key for key, state in self._states.items() if not state.busy]
            for key in idle[: _MOST_TARGETS // 10]:
                del self._states[key]
        state = self._states[target] = _State()
        return state
