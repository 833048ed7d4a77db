"""What the attempts of each track came to, in Redis."""

from __future__ import annotations

import math

import pytest
import redis

from inferq.storage import StatusIndex
from inferq.storage.tracks import KEPT_SECONDS, SLICE_SECONDS, TrackRecords, bucket_of, seconds_of


@pytest.fixture
def records(index: StatusIndex) -> TrackRecords:
    return TrackRecords(index)


def test_counts_of_several_workers_and_tracks_add_up(records: TrackRecords) -> None:
    assert records.add("ocr", "canary", {"succeeded": 2, "retried": 1, "40": 2})
    assert records.add("ocr", "canary", {"succeeded": 1, "failed": 1, "41": 1})
    assert records.add("ocr", "stable", {"succeeded": 5, "40": 5})
    assert records.add("ner", "canary", {"failed": 7})
    found = records.read("ocr", 3600)
    assert found.keys() == {"canary", "stable"}
    assert (found["canary"].attempts, found["canary"].failures) == (5, 2)
    assert found["canary"].buckets == {40: 2, 41: 1}
    assert (found["stable"].attempts, found["stable"].failures) == (5, 0)


def test_only_the_slices_of_the_time_asked_for_are_read(
    records: TrackRecords, redis_client: redis.Redis
) -> None:
    records.add("ocr", "canary", {"succeeded": 1})
    (key,) = redis_client.keys("inferq:tracks:ocr:*")
    prefix, _, number = key.rpartition(":")
    redis_client.hset(f"{prefix}:{int(number) - 12}", mapping={"canary:succeeded": 10})
    redis_client.hset(f"{prefix}:{int(number) - 13}", mapping={"canary:succeeded": 100})
    assert records.read("ocr", 1)["canary"].attempts in (1, 11)  # the slice may end while the test runs
    assert records.read("ocr", 12 * SLICE_SECONDS)["canary"].attempts == 11
    assert records.read("ocr", 14 * SLICE_SECONDS)["canary"].attempts == 111


def test_a_million_attempts_take_no_more_room_than_their_spread_of_seconds(
    records: TrackRecords, redis_client: redis.Redis
) -> None:
    for _ in range(2):
        records.add("ocr", "canary", {"succeeded": 500_000, "40": 500_000})
    (key,) = redis_client.keys("inferq:tracks:*")
    assert redis_client.hlen(key) == 2
    assert KEPT_SECONDS - 60 < redis_client.ttl(key) <= KEPT_SECONDS
    assert records.read("ocr", 60)["canary"].attempts == 1_000_000


@pytest.mark.parametrize("seconds", [0.001, 0.0011, 0.05, 1.0, 2.15, 59.9, 3600.0, 86_400.0])
def test_a_bucket_is_at_most_5_percent_from_each_of_its_seconds(seconds: float) -> None:
    assert abs(seconds_of(bucket_of(seconds)) / seconds - 1) < 0.05


def test_the_buckets_are_few_and_take_every_number() -> None:
    assert bucket_of(0.0) == bucket_of(1e-9) == 0
    assert bucket_of(86_400.0) < 200
    assert bucket_of(math.nextafter(1.0, 2.0)) in (bucket_of(1.0), bucket_of(1.0) + 1)
