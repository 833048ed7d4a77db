"""What tenants used, counted with the ends of their tasks."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta, timezone
from pathlib import Path

import pytest
import redis

from inferq.storage import BatchIndex, StatusIndex, StatusOutage, StorageSettings
from inferq.storage.status.usage import USAGE_DAYS, Usage, mean_seconds, usage_key
from tests.storage.tasks import ERROR, NOW, begin, end, job

DAY = date(2026, 11, 20)


def test_an_end_counts_in_the_usage_of_its_day_once(index: StatusIndex, redis_client: redis.Redis) -> None:
    midnight = datetime(2026, 11, 21, 0, 30, tzinfo=timezone(timedelta(hours=1)))  # the 20th, in UTC
    for name, status, seconds in (("a", "succeeded", 1.5), ("b", "failed", 0.25), ("c", "cancelled", 0.0)):
        task = job(name)
        begin(index, task)
        ended = end(task, status, finished_at=midnight)
        for call in (ended, ended, end(task, "failed", finished_at=midnight)):
            index.ended_pipelined(call, engine_seconds=seconds)()
    index.ended(end(job("d"), finished_at=midnight))  # reported again by a part that ran nothing
    assert index.usage([DAY, DAY + timedelta(days=1)]) == [
        Usage(DAY, "default", "job", succeeded=1, failed=1, cancelled=1, engine_seconds=1.75)
    ]
    assert 399 < redis_client.ttl(usage_key(DAY)) / 86400 <= USAGE_DAYS


def test_failed_attempts_count_in_the_usage_and_late_copies_do_not(index: StatusIndex) -> None:
    task = job(tenant="acme")
    begin(index, task)
    for attempt in (1, 1, 2, 1):
        index.retrying(task, attempt=attempt, redrives=0, error=ERROR, engine_seconds=2.0)
    index.retrying(job(tenant="acme", text="other"), attempt=9, redrives=0, error=ERROR, engine_seconds=2.0)
    today = datetime.now(UTC).date()
    assert index.usage([today]) == [Usage(today, "acme", "job", retried=2, engine_seconds=4.0)]


def test_a_line_of_a_batch_counts_in_the_usage_once(index: StatusIndex) -> None:
    batches = BatchIndex(index)
    task = job("b.1", batch_id="b", batch_line=1)
    batches.mark("default", "b", "fed", [1])
    begin(index, task)
    ended = end(task, batch_line=1, finished_at=NOW)
    for _ in range(2):
        index.ended_pipelined(ended, engine_seconds=3.0)()
    assert index.usage([NOW.date()]) == [Usage(NOW.date(), "default", "job", succeeded=1, engine_seconds=3.0)]


def test_a_task_takes_the_seconds_of_all_runs_by_the_tasks_that_ended() -> None:
    used = [
        Usage(DAY, "a", "ocr", succeeded=2, failed=1, retried=4, engine_seconds=10.0),
        Usage(DAY, "b", "ocr", cancelled=1, engine_seconds=2.0),
        Usage(DAY, "a", "ner", retried=3, engine_seconds=9.0),
    ]
    assert mean_seconds(used) == {"ocr": 3.0}, "of ner, no task has ended"


def test_usage_is_unknown_while_redis_is_unavailable(tmp_path: Path) -> None:
    index = StatusIndex.from_settings(StorageSettings(redis_url=f"unix://{tmp_path}/nobody"))
    with pytest.raises(StatusOutage):
        index.usage([DAY])
