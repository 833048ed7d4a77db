"""`inferq usage`: what Redis has of the tenants' engine seconds and tasks."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import redis

from inferq.schemas import Result
from inferq.storage import StatusIndex, StorageSettings
from tests.installation import inferq_here

NOW = datetime.now(UTC)
TODAY, YESTERDAY = NOW.date().isoformat(), (NOW - timedelta(days=1)).date().isoformat()


@pytest.fixture(scope="module")
def env(redis_url: str) -> Iterator[dict[str, str]]:
    """A Redis with two tasks of today, and one of yesterday."""
    index = StatusIndex.from_settings(StorageSettings(redis_url=redis_url))
    for task_id, tenant, task_type, status, day, seconds in (
        ("a", "acme", "ocr", "succeeded", NOW, 2.5), ("b", "acme", "ocr", "failed", NOW, 1.0),
        ("c", "zoo", "ner", "succeeded", NOW - timedelta(days=1), 0.125),
    ):  # fmt: skip
        ended = Result.model_validate(
            {"task_id": task_id, "task_type": task_type, "tenant": tenant, "status": status, "attempts": 1,
             "finished_at": day}
        )  # fmt: skip
        index.ended_pipelined(ended, engine_seconds=seconds)()
    index.close()
    yield {"INFERQ_REDIS_URL": redis_url, "COLUMNS": "200"}
    with redis.Redis.from_url(redis_url) as client:
        client.flushdb()


ACME: dict[str, Any] = {
    "day": TODAY, "tenant": "acme", "type": "ocr", "tasks": 2, "succeeded": 1, "failed": 1, "cancelled": 0,
    "retried": 0, "engine_seconds": 3.5,
}  # fmt: skip
ZOO = ACME | {
    "day": YESTERDAY,
    "tenant": "zoo",
    "type": "ner",
    "tasks": 1,
    "failed": 0,
    "engine_seconds": 0.125,
}


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ([], [ZOO, ACME]), (["--from", TODAY], [ACME]), (["--to", YESTERDAY], [ZOO]), (["--tenant", "zoo"], [ZOO]),
        (["--type", "ocr"], [ACME]), (["--tenant", "zoo", "--type", "ocr"], []),
    ],
)  # fmt: skip
def test_usage_is_by_tenant_type_and_day(
    env: dict[str, str], options: list[str], found: list[dict[str, Any]]
) -> None:
    printed = inferq_here(env, "usage", "--json", *options)
    assert (printed.returncode, json.loads(printed.stdout)) == (0, found)
    printed = inferq_here(env, "usage", "--csv", *options)
    assert list(csv.DictReader(io.StringIO(printed.stdout))) == [
        {name: str(value) for name, value in facts.items()} for facts in found
    ]


def test_the_table_has_a_total(env: dict[str, str]) -> None:
    lines = inferq_here(env, "usage").stdout.splitlines()
    assert [line.split() for line in lines[1:]] == [
        [YESTERDAY, "zoo", "ner", "1", "1", "0", "0", "0", "0.125"],
        [TODAY, "acme", "ocr", "2", "1", "1", "0", "0", "3.5"],
        ["total", "3", "2", "1", "0", "0", "3.625"],
    ]
    assert inferq_here(env, "usage", "--tenant", "nobody").stdout == "none\n"


def test_without_redis_usage_is_unknown_and_never_nothing(tmp_path: Path) -> None:
    for option in ("--json", "--csv"):
        printed = inferq_here({"INFERQ_REDIS_URL": f"unix://{tmp_path}/nobody"}, "usage", option)
        assert (printed.returncode, printed.stdout) == (1, "")
        assert "the usage is unknown: Redis at" in printed.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--from", "yesterday"], "--from 'yesterday' is not a day; write 2026-11-25"),
        (["--from", TODAY, "--to", YESTERDAY], "swap them"),
        (["--from", str(date(2020, 1, 1))], "too early: usage is kept for 400 days"),
    ],
)
def test_a_wrong_day_is_a_clear_error(options: list[str], said: str) -> None:
    printed = inferq_here({}, "usage", *options)
    assert (printed.returncode, printed.stdout) == (1, "")
    assert said in printed.stderr
