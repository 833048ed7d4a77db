"""Decides what follows an attempt to deliver a callback. Pure: no clock, no network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime

from inferq.schemas import CallbackAttempt

MAX_RETRY_AFTER = 86400.0
"""The longest `Retry-After` that is honoured, in seconds; a longer one counts as this."""

JITTER = 0.1
"""A pause is up to this share longer than the schedule says, so that retries spread out."""

_GONE = 410


@dataclass(frozen=True)
class Delivered:
    """The receiver accepted the callback."""


@dataclass(frozen=True)
class Again:
    """Try again `seconds` from now."""

    seconds: float


@dataclass(frozen=True)
class GivenUp:
    """No further attempt, because of `reason`."""

    reason: str


Decision = Delivered | Again | GivenUp


def after_attempt(
    attempts: Sequence[CallbackAttempt],
    schedule: Sequence[float],
    *,
    retry_after: float | None = None,
    chance: float = 0.0,
) -> Decision:
    """The decision after the last of these attempts.

    `schedule` has the seconds before each attempt. `retry_after` is the receiver's `Retry-After`, in seconds.
    `chance`, from 0 to 1, sets the jitter.
    """
    last = attempts[-1]
    if last.status is not None and 200 <= last.status < 300:
        return Delivered()
    if last.status == _GONE:
        return GivenUp("the receiver answered 410 Gone: it accepts no more callbacks")
    if len(attempts) >= len(schedule):
        what = f"status {last.status}" if last.status is not None else last.error
        return GivenUp(f"{len(attempts)} attempts failed, the last with: {what}")
    pause = schedule[len(attempts)] * (1 + JITTER * chance)
    if retry_after is not None:
        # A shorter Retry-After is ignored: a broken receiver would use up the schedule.
        pause = max(pause, min(retry_after, MAX_RETRY_AFTER) * (1 + JITTER * chance))
    return Again(pause)


def retry_after_seconds(value: str, now: datetime) -> float | None:
    """The seconds that a `Retry-After` header asks for, as a number or an HTTP date (RFC 9110, 10.2.3)."""
    text = value.strip()
    if text.isascii() and text.isdigit():
        return float(text[:12])
    try:
        moment = parsedate_to_datetime(text)
    except (ValueError, TypeError, OverflowError):
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=now.tzinfo)
    return max(0.0, (moment - now).total_seconds())
