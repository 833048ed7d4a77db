"""The delays before another try: retry levels for tasks, and backoff for calls.

Whether a task is retried: inferq.consumers.worker.decision.
"""

from __future__ import annotations

import random

RETRY_LEVELS: tuple[int, ...] = (5, 30, 120, 600, 3600)
"""Seconds between a failed attempt and the next. Each level is a queue on the broker."""


def retry_level(attempt: int) -> int:
    """Seconds to wait after attempt number `attempt` failed. Attempts count from 1."""
    if attempt < 1:
        raise ValueError(f"attempts are counted from 1, got {attempt}")
    return RETRY_LEVELS[min(attempt, len(RETRY_LEVELS)) - 1]


def backoff(failures: int, *, base: float = 0.2, cap: float = 15.0) -> float:
    """Seconds to wait after `failures` failures in a row: exponential, and half of it random.

    The random part keeps many processes from reconnecting to a broker at the same time.
    """
    ceiling = min(cap, base * 2.0 ** min(max(failures - 1, 0), 30))
    return ceiling * (0.5 + random.random() / 2)  # noqa: S311 - jitter, not a secret
