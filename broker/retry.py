"""When to try again: the retry levels, and the backoff of what waits in place."""

from __future__ import annotations

import random

RETRY_LEVELS: tuple[int, ...] = (5, 30, 120, 600, 3600)
"""Seconds that a failed attempt waits before the next; each level is a queue of its own on the broker."""


def retry_level(attempt: int) -> int:
    """Seconds to wait after the failure of attempt number `attempt`, counted from 1."""
    if attempt < 1:
        raise ValueError(f"attempts are counted from 1, got {attempt}")
    return RETRY_LEVELS[min(attempt, len(RETRY_LEVELS)) - 1]


def backoff(failures: int, *, base: float = 0.2, cap: float = 15.0) -> float:
    """Seconds to wait after `failures` failures in a row: exponential, with half of it random.

    The random part keeps a fleet that lost its broker from coming back all at once.
    """
    ceiling = min(cap, base * 2.0 ** min(max(failures - 1, 0), 30))
    return ceiling * (0.5 + random.random() / 2)  # noqa: S311 - jitter, not a secret
