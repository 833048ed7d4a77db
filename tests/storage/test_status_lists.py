"""Lists of tasks: filters, and pages that hold while tasks come and go."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import pytest
import redis

from inferq.schemas import (
    InvalidTask,
    Task,
)
from inferq.storage import StatusIndex
from inferq.storage.status.keys import record_key
from tests.storage.tasks import Job, begin, end, job, known


def listed(index: StatusIndex, limit: int, **filters: Any) -> list[str]:
    found: list[str] = []
    cursor = None
    while True:
        page = index.list("default", cursor=cursor, limit=limit, **filters)
        assert len(page.items) <= limit
        found += [status.task_id for status in page.items]
        cursor = page.cursor
        if cursor is None:
            return found


def test_pages_hold_every_task_once_even_where_all_were_made_at_once(index: StatusIndex) -> None:
    now = datetime.now(UTC)
    ids = [f"id{number:03d}" for number in range(120)]
    for number, task_id in enumerate(ids):
        index.submit(job(task_id, created_at=now - timedelta(seconds=number // 50)))
    expected = sorted(ids, key=lambda i: (-(int(i[2:]) // 50), i), reverse=True)
    for limit in (1, 7, 50, 119, 120, 121, 10_000, 0):
        assert listed(index, max(limit, 1)) == expected
    page = index.list("default", limit=120)
    assert page.cursor is None, "the last page knows that it is"


def test_a_cursor_holds_while_tasks_come_and_go(index: StatusIndex, redis_client: redis.Redis) -> None:
    now = datetime.now(UTC)
    tasks = [job(f"id{n}", created_at=now) for n in range(9, -1, -1)]
    for task in tasks:
        index.submit(task)
    page = index.list("default", limit=4, state="queued")
    assert [status.task_id for status in page.items] == ["id9", "id8", "id7", "id6"]
    index.submit(job("newer"))
    begin(index, job("id6", created_at=now))  # leaves the state's index: the cursor's own entry is gone
    redis_client.delete(record_key("default", "id5"))
    rest = index.list("default", limit=10, state="queued", cursor=page.cursor)
    assert [status.task_id for status in rest.items] == ["id4", "id3", "id2", "id1", "id0"]
    everything = index.list("default", limit=10, cursor=index.list("default", limit=5).cursor)
    assert [status.task_id for status in everything.items] == ["id4", "id3", "id2", "id1", "id0"]
    assert listed(index, 3, state="running") == ["id6"]


def test_filters_combine(index: StatusIndex) -> None:
    class Other(Task):
        task_type: Literal["other"] = "other"

    now = datetime.now(UTC)
    for number in range(40):
        kind = Job if number % 2 else Other
        task = kind(
            task_id=f"t{number:02d}",
            created_at=now + timedelta(microseconds=number - 100),
            batch_id="ab"[number % 3 > 0],
        )
        index.submit(task)
        if number % 5 == 0:
            index.ended(end(task, "failed" if number % 10 else "succeeded"))
    every = range(39, -1, -1)

    def ids(keep: Callable[[int], bool]) -> list[str]:
        return [f"t{number:02d}" for number in every if keep(number)]

    for limit in (1, 3, 50):
        assert listed(index, limit, task_type="job") == ids(lambda n: n % 2 == 1)
        assert listed(index, limit, state="succeeded") == ids(lambda n: n % 10 == 0)
        assert listed(index, limit, state="failed") == ids(lambda n: n % 10 == 5)
        assert listed(index, limit, batch_id="a") == ids(lambda n: n % 3 == 0)
        assert listed(index, limit, batch_id="b", state="queued", task_type="other") == ids(
            lambda n: n % 3 > 0 and n % 5 > 0 and n % 2 == 0
        )
        assert listed(index, limit, batch_id="none") == []
        assert listed(index, limit, task_type="none") == []
    assert index.list("someone-else").items == ()


def test_a_rare_task_is_found_behind_very_many_others(index: StatusIndex, redis_client: redis.Redis) -> None:
    now = datetime.now(UTC)
    index.ended(end(job("rare", created_at=now), created_at=now - timedelta(hours=1)))
    with redis_client.pipeline() as pipe:
        for number in range(1200):
            micros = int(now.timestamp() * 1e6)
            pipe.hset(record_key("default", f"n{number}"), mapping={"s": "queued", "ty": "job", "o": 1})
            pipe.zadd("inferq:l:default", {f"n{number}": micros})
        pipe.execute()
    assert listed(index, 5, state="succeeded") == ["rare"]


@pytest.mark.parametrize(
    "cursor", ["x", "!!!", "AAAA", "e30", "1:", "1:a\n", "MTph", "é", "MTpcbg==", "a" * 5000, "\ud800"]
)
def test_a_bad_cursor_is_refused(index: StatusIndex, cursor: str) -> None:
    with pytest.raises(InvalidTask) as caught:
        index.list("default", cursor=cursor)
    assert caught.value.code == "bad_cursor"


def test_made_up_creation_times_neither_hide_nor_keep_a_task(
    index: StatusIndex, redis_client: redis.Redis
) -> None:
    old, future = datetime(1970, 1, 1, tzinfo=UTC), datetime(9000, 1, 1, tzinfo=UTC)
    index.submit(job("old", created_at=old))
    index.submit(job("future", created_at=future))
    index.submit(job("now"))
    assert listed(index, 10) == ["now", "future", "old"]
    assert known(index, job("future")).created_at == future
    assert known(index, job("old")).created_at == old
    now = time.time() * 1e6
    scores: Any = redis_client.zrange("inferq:l:default", 0, -1, withscores=True)
    for _, score in scores:
        assert now - 8 * 86400e6 < float(score) <= now
