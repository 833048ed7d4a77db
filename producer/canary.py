"""Whether a canary does as well as the stable track: from counts of attempts to a verdict.

Both answers are statements at 95 % confidence. The difference of two failure rates has Newcombe's interval (Statistics
in Medicine 17, 1998, method 10), which holds for few failures and for none. A quantile of seconds lies between two of
its order statistics, whatever the distribution is.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from inferq.storage.tracks import TrackCounts, seconds_of

Verdict = Literal["good", "worse", "unclear"]

QUANTILES = (0.5, 0.95)
_Z = 1.96
"""Standard deviations of a normal distribution to each side that hold 95 %."""


@dataclass(frozen=True)
class Estimate:
    """A number and its range at 95 % confidence. None is unknown: too few attempts."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Limits:
    """What a canary may cost: failures beyond those of the stable track, as a share, and times its seconds."""

    more_failures: float = 0.02
    slowdown: float = 1.25


@dataclass(frozen=True)
class Comparison:
    """A canary beside the stable track. `more_failures` is a difference of shares, `slowdowns` are ratios."""

    canary: TrackCounts
    stable: TrackCounts
    more_failures: Estimate
    slowdowns: dict[float, Estimate]
    verdict: Verdict = "unclear"
    reasons: tuple[str, ...] = ()


def compare(canary: TrackCounts, stable: TrackCounts, limits: Limits) -> Comparison:
    """Compare the tracks. `worse` and `good` hold at 95 % confidence; in between the verdict is `unclear`."""
    made = Comparison(
        canary,
        stable,
        _difference(canary, stable),
        {share: _ratio(quantile(canary.buckets, share), quantile(stable.buckets, share)) for share in QUANTILES},
    )  # fmt: skip
    if missing := tuple(_missing(made)):
        return replace(made, reasons=missing)
    if worse := tuple(_worse(made, limits)):
        return replace(made, verdict="worse", reasons=worse)
    if unclear := tuple(_unclear(made, limits)):
        return replace(made, reasons=unclear)
    return replace(made, verdict="good")


def failure_rate(counts: TrackCounts) -> float | None:
    """The share of the attempts that failed; None without an attempt."""
    return counts.failures / counts.attempts if counts.attempts else None


def quantile(buckets: Counter[int], share: float) -> Estimate:
    """The engine seconds below which a `share` of the successes are."""
    total = sum(buckets.values())
    if not total:
        return Estimate(None)
    spread = _Z * math.sqrt(total * share * (1 - share))
    return Estimate(
        _ranked(buckets, max(1, math.ceil(total * share))),
        _ranked(buckets, math.floor(total * share - spread)),
        _ranked(buckets, math.ceil(total * share + spread) + 1),
    )


def _ranked(buckets: Counter[int], rank: int) -> float | None:
    """The seconds of this rank, 1 for the shortest; None if there is no such rank."""
    if rank < 1:
        return None
    seen = 0
    for bucket in sorted(buckets):
        seen += buckets[bucket]
        if seen >= rank:
            return seconds_of(bucket)
    return None


def _difference(canary: TrackCounts, stable: TrackCounts) -> Estimate:
    one, other = failure_rate(canary), failure_rate(stable)
    if one is None or other is None:
        return Estimate(None)
    low, high = _wilson(canary.failures, canary.attempts)
    other_low, other_high = _wilson(stable.failures, stable.attempts)
    return Estimate(
        one - other,
        one - other - math.hypot(one - low, other_high - other),
        one - other + math.hypot(high - one, other - other_low),
    )


def _wilson(failures: int, attempts: int) -> tuple[float, float]:
    """Wilson's interval of a failure rate."""
    rate, square = failures / attempts, _Z * _Z
    middle = rate + square / (2 * attempts)
    half = _Z * math.sqrt(rate * (1 - rate) / attempts + square / (4 * attempts**2))
    scale = 1 + square / attempts
    return (middle - half) / scale, (middle + half) / scale


def _ratio(one: Estimate, other: Estimate) -> Estimate:
    return Estimate(_over(one.value, other.value), _over(one.low, other.high), _over(one.high, other.low))


def _over(above: float | None, below: float | None) -> float | None:
    return None if above is None or below is None else above / below


# The verdict.


def _missing(made: Comparison) -> Iterator[str]:
    for name, counts in (("canary", made.canary), ("stable track", made.stable)):
        if not counts.attempts:
            yield f"the {name} has ended no attempt"


def _worse(made: Comparison, limits: Limits) -> Iterator[str]:
    more = made.more_failures
    if more.low is not None and more.low > limits.more_failures:
        yield f"it fails more often, by at least {more.low:.1%} of its attempts"
    for share, ratio in made.slowdowns.items():
        if ratio.low is not None and ratio.low > limits.slowdown:
            yield f"it is slower: p{share * 100:.0f} of the engine seconds is at least {ratio.low:.2f} times as long"


def _unclear(made: Comparison, limits: Limits) -> Iterator[str]:
    more, median = made.more_failures, made.slowdowns[0.5]
    if more.high is not None and more.high > limits.more_failures:
        yield f"up to {more.high:.1%} more of its attempts may fail"
    if median.high is None:
        yield "too few successes to compare seconds"
    elif median.high > limits.slowdown:
        yield f"p50 of the engine seconds may be up to {median.high:.2f} times as long"
