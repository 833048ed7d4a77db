"""`inferq canary`: the verdict on a canary, and what it is made of."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from inferq.producer.canary import Limits, Verdict, compare, quantile
from inferq.storage import StatusIndex, StorageSettings
from inferq.storage.tracks import TrackCounts, TrackRecords, bucket_of
from tests.installation import inferq_here


def counts(succeeded: int, failed: int = 0, *, retried: int = 0, seconds: float = 2.0) -> TrackCounts:
    """A track whose runs take about `seconds`."""
    spread = random.Random(1)
    buckets = Counter(bucket_of(seconds * spread.uniform(0.7, 1.3)) for _ in range(succeeded))
    return TrackCounts(Counter(succeeded=succeeded, failed=failed, retried=retried), buckets)


STABLE = counts(2000, 20)


@pytest.mark.parametrize(
    ("canary", "verdict", "reason"),
    [
        (counts(400, 4), "good", ""),
        (counts(400, 4, seconds=1.0), "good", ""),
        (counts(400), "good", ""),
        (counts(360, 40), "worse", "it fails more often, by at least 6"),
        (counts(360, 0, retried=40), "worse", "it fails more often"),  # a stable worker repeats its attempts
        (counts(0, 12), "worse", "it fails more often"),
        (counts(400, 4, seconds=3.0), "worse", "it is slower: p50"),
        (counts(400, 12), "unclear", "more of its attempts may fail"),
        (counts(400, 4, seconds=2.5), "unclear", "p50 of the engine seconds may be up to 1."),
        (counts(20), "unclear", "up to 1"),
        (counts(1), "unclear", "too few successes to compare seconds"),
        (TrackCounts(), "unclear", "the canary has ended no attempt"),
    ],
)
def test_the_verdict_says_only_what_the_numbers_hold(
    canary: TrackCounts, verdict: Verdict, reason: str
) -> None:
    made = compare(canary, STABLE, Limits())
    assert (made.verdict, reason in "; ".join(made.reasons)) == (verdict, True), made.reasons
    assert bool(made.reasons) == (verdict != "good")


def test_without_a_stable_track_nothing_is_compared() -> None:
    made = compare(STABLE, TrackCounts(), Limits())
    assert (made.verdict, made.reasons) == ("unclear", ("the stable track has ended no attempt",))


def test_the_limits_are_those_that_were_asked_for() -> None:
    canary = counts(360, 40, seconds=3.0)
    assert compare(canary, STABLE, Limits(more_failures=0.2, slowdown=2.0)).verdict == "good"


def test_the_difference_of_rates_has_the_interval_of_the_paper() -> None:
    # Newcombe 1998, table II, method 10: 56/70 and 48/80.
    made = compare(counts(14, 56), counts(32, 48), Limits()).more_failures
    assert made.value == pytest.approx(0.2)
    assert (made.low, made.high) == (pytest.approx(0.0524, abs=1e-4), pytest.approx(0.3339, abs=1e-4))


@pytest.mark.parametrize("share", [0.5, 0.95])
def test_a_quantiles_range_holds_the_true_one_about_95_times_of_100(share: float) -> None:
    spread = random.Random(7)
    true, held = 0.5 if share == 0.5 else 0.95, 0  # of the uniform distribution
    for _ in range(300):
        found = quantile(Counter(bucket_of(spread.random()) for _ in range(200)), share)
        assert found.low is not None
        assert found.high is not None
        held += found.low / 1.05 <= true <= found.high * 1.05
    assert held >= 280


def test_a_canary_with_the_same_work_is_seldom_called_worse() -> None:
    spread = random.Random(3)

    def track(attempts: int) -> TrackCounts:
        failed = sum(spread.random() < 0.05 for _ in range(attempts))
        buckets = Counter(bucket_of(spread.lognormvariate(0.7, 0.9)) for _ in range(attempts - failed))
        return TrackCounts(Counter(succeeded=attempts - failed, failed=failed), buckets)

    verdicts = Counter(compare(track(300), track(1500), Limits()).verdict for _ in range(100))
    assert verdicts["worse"] <= 3, verdicts


# The command.


@pytest.fixture(scope="module")
def env(redis_url: str) -> Iterator[dict[str, str]]:
    """A Redis with a good canary of ocr, a bad one of ner, and one of echo that has done little."""
    index = StatusIndex.from_settings(StorageSettings(redis_url=redis_url))
    records, bucket = TrackRecords(index), str(bucket_of(2.0))
    for task_type, track, succeeded, failed in (
        ("ocr", "stable", 2000, 20), ("ocr", "canary", 400, 4), ("ner", "stable", 2000, 20),
        ("ner", "canary", 300, 100), ("echo", "stable", 2000, 20), ("echo", "v2", 3, 0),
    ):  # fmt: skip
        records.add(task_type, track, {"succeeded": succeeded, "failed": failed, bucket: succeeded})
    index.close()
    yield {"INFERQ_REDIS_URL": redis_url, "COLUMNS": "200"}
    with redis.Redis.from_url(redis_url) as client:
        client.flushdb()


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("ocr",), 0, "verdict: good\n"),
        (("ner",), 3, "verdict: worse: it fails more often"),
        (("ner", "--max-more-failures", "50%"), 0, "verdict: good\n"),
        (("echo", "--canary", "v2"), 4, "verdict: unclear: up to"),
        (("echo",), 4, "no attempts of 'canary' in the last 1 h 0 min. Tracks with attempts: stable, v2."),
        (("ocr", "--canary", "stable", "--stable", "canary", "--since", "2d"), 0, "verdict: good\n"),
    ],
)
def test_the_exit_status_is_the_verdict(
    env: dict[str, str], arguments: tuple[str, ...], status: int, said: str
) -> None:
    printed = inferq_here(env, "canary", "report", *arguments)
    assert (printed.returncode, said in printed.stdout) == (status, True), printed.stdout + printed.stderr


def test_the_table_has_both_tracks_with_their_difference(env: dict[str, str]) -> None:
    lines = inferq_here(env, "canary", "report", "ner").stdout.splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["canary", "stable", "difference", "(95", "%)"],
        ["attempts", "400", "2,020"],
        ["failed", "100", "(25.0%)", "20", "(1.0%)", "+24.0%", "(+20.0%", "to", "+28.5%)"],
    ]
    assert lines[3].startswith("engine seconds, p50")
    assert lines[3].split()[3:] == ["1.95", "1.95", "×1.00", "(×1.00", "to", "×1.00)"]


def test_the_json_has_the_figures_and_the_verdict(env: dict[str, str]) -> None:
    printed = inferq_here(env, "canary", "report", "ner", "--json")
    facts = json.loads(printed.stdout)
    assert (printed.returncode, facts["verdict"], facts["type"]) == (3, "worse", "ner")
    assert facts["tracks"]["canary"].items() >= {"track": "canary", "attempts": 400, "failed": 100}.items()
    assert facts["tracks"]["canary"]["failure_rate"] == 0.25
    assert facts["more_failures"]["low"] == pytest.approx(0.2, abs=0.01)
    assert facts["slowdown"]["p50"]["value"] == 1.0
    assert facts["reasons"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--since", "3d"), "--since '3d' must be from 1s to 2 d 0 h"),
        (("--since", "yesterday"), "write 90s, 30m, 8h or 1d"),
        (("--max-more-failures", "2 percent"), "--max-more-failures"),
    ],
)
def test_a_wrong_option_is_a_clear_error(options: tuple[str, str], said: str) -> None:
    printed = inferq_here({}, "canary", "report", "ocr", *options)
    assert (printed.returncode, printed.stdout) == (1, "")
    assert said in printed.stderr


def test_without_redis_the_verdict_is_unknown_and_never_good(tmp_path: Path) -> None:
    printed = inferq_here({"INFERQ_REDIS_URL": f"unix://{tmp_path}/nobody"}, "canary", "report", "ocr")
    assert (printed.returncode, printed.stdout) == (1, "")
    assert "the figures are unknown: Redis at" in printed.stderr
