"""How a test waits: for a condition, never for a time."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from typing import TypeVar

import httpx

Seen = TypeVar("Seen")

_LOOK_SECONDS = 0.02
_SELDOM_SECONDS = 0.1
"""How long it takes to the next look at first, and at most: many looks open a connection."""
_SHOWN_CHARACTERS = 500


def eventually(condition: Callable[[], Seen], what: str | None = None, *, seconds: float = 60) -> Seen:
    """Call the condition until it gives something true, and give that.

    The deadline is reached only on failure, so it is far above the longest wait on a busy machine. Raises
    TimeoutError with `what` was awaited (default: the condition's source) and what the condition gave last.
    """
    end = time.monotonic() + seconds
    pause = _LOOK_SECONDS
    while not (seen := condition()):
        if time.monotonic() > end:
            raise TimeoutError(
                f"not within {seconds:g} s: {what or _source(condition)}; "
                f"seen last: {repr(seen)[:_SHOWN_CHARACTERS]}"
            )
        time.sleep(pause)
        pause = min(1.2 * pause, _SELDOM_SECONDS)
    return seen


def consistently(condition: Callable[[], object], what: str | None = None, *, seconds: float) -> None:
    """Call the condition for that long, and fail once it gives something false: for what must not happen."""
    end = time.monotonic() + seconds
    while True:
        seen = condition()
        assert seen, f"within {seconds:g} s no longer: {what or _source(condition)}; seen: {seen!r}"
        if time.monotonic() > end:
            return
        time.sleep(_LOOK_SECONDS)


def takes_work(readiness: httpx.Response) -> bool:
    """Whether a part with this answer to `GET /readyz` takes work. A worker is ready while it waits for a service."""
    return readiness.status_code == 200 and not readiness.json().get("waiting_for")


def _source(condition: Callable[[], object]) -> str:
    try:
        return " ".join(inspect.getsource(condition).split())
    except (OSError, TypeError):
        return repr(condition)
