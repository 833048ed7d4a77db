"""Limits callbacks in flight per target, so that a dead or slow target never delays another's callbacks.

A target is a scheme, host and port. A callback over the limit is deferred: it waits in the broker for its own
delay.
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
"""Bounds of the delay over the limit, in seconds. A dead target may recover soon, hence the upper bound."""

_NEW_LIMIT = 2
"""The limit of a target that has not answered yet: enough to learn its state, too few to block others."""

_MOST_TARGETS = 10_000

_Standing = Literal["trusted", "new", "suspect"]


@dataclass
class _State:
    """A target's state. `hangs_since`: since when every attempt has timed out. `seconds`: a moving average per
    attempt. `next_at`: when the last deferred callback is due."""

    standing: _Standing = "new"
    hangs_since: float | None = None
    busy: int = 0
    seconds: float = 0.2
    next_at: float = 0.0


@dataclass
class Targets:
    """Shares the `threads` of one process among the targets. Safe from many threads.

    - A trusted target, which answers, gets up to `limit`, and at most half of the threads that others leave.
    - A new target gets two.
    - A suspect, whose last attempt timed out or took longer than `slow` seconds, gets one.

    All suspects together get at most half of the threads; suspects and new targets at most three quarters.
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
        """Reserve a slot and return None; `leave` frees it. At the limit, return the delay in seconds."""
        with self._lock:
            state = self._states.get(target) or self._add(target)
            most = self._most(state)
            if state.busy < most:
                state.busy += 1
                self._busy[state.standing] += 1
                return None
            return self._delay(state)

    def hung(self, target: Target) -> float:
        """For how many seconds every attempt at the target has timed out; 0 if the last one did not."""
        with self._lock:
            state = self._states.get(target)
            if state is None or state.hangs_since is None:
                return 0.0
            return self.clock() - state.hangs_since

    def leave(self, target: Target, seconds: float | None, *, timed_out: bool = False) -> None:
        """Free a slot after an attempt that took `seconds`; None if nothing was sent."""
        with self._lock:
            state = self._states[target]
            if seconds is None:
                state.busy -= 1
                self._busy[state.standing] -= 1
                return
            suspect = timed_out or seconds > self.slow
            self._busy[state.standing] -= state.busy
            if state.standing == "suspect" and not suspect:
                # It has recovered: the delays computed before no longer apply.
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
        """The target's limit at this moment."""
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
        """A distinct delay per callback, spaced by the time that the target needs for one."""
        now = self.clock()
        limit = {"trusted": self.limit, "new": _NEW_LIMIT, "suspect": 1}[state.standing]
        state.next_at = max(state.next_at, now + SHORTEST_DELAY) + state.seconds / limit
        if state.next_at - now > LONGEST_DELAY:
            # More callbacks than fit: spread the rest over the second half of the longest delay.
            state.next_at = now + LONGEST_DELAY
            return LONGEST_DELAY * (0.5 + self.chance() / 2)
        return state.next_at - now

    def _add(self, target: Target) -> _State:
        if len(self._states) >= _MOST_TARGETS:
            # Forget the oldest idle targets; their state is learnt again.
            idle = [key for key, state in self._states.items() if not state.busy]
            for key in idle[: _MOST_TARGETS // 10]:
                del self._states[key]
        state = self._states[target] = _State()
        return state
