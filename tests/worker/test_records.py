"""What a delivery leaves behind."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from inferq.broker import Delivery
from inferq.consumers.worker.records import Records
from inferq.schemas import InvalidTask, Timings, parse_task

NOW = datetime(2026, 11, 30, 12, 0, 0, tzinfo=UTC)
AHEAD, LONG_AGO = datetime(2100, 1, 1, tzinfo=UTC), datetime(1970, 1, 1, tzinfo=UTC)


def ago(**time: float) -> datetime:
    return NOW - timedelta(**time)


@pytest.mark.parametrize(
    ("created", "sent", "seconds"),
    [
        (ago(seconds=5), ago(seconds=1), 5.0),
        (ago(days=29), None, 29 * 86400.0),  # a backlog may be that old
        (ago(seconds=-2), None, 0.0),  # a clock a little ahead
        (LONG_AGO, ago(seconds=3), 3.0),
        (AHEAD, ago(seconds=3), 3.0),
        (None, ago(seconds=3), 3.0),
        (LONG_AGO, None, None),
        (AHEAD, AHEAD, None),
        (None, LONG_AGO, None),
        (None, None, None),
    ],
)
def test_a_creation_time_that_cannot_be_true_is_no_waiting_time(
    created: datetime | None, sent: datetime | None, seconds: float | None
) -> None:
    delivery = Delivery(
        queue="inference.echo.normal", tag=1, epoch=1, body=b"", routing_key="", headers={}, redelivered=False,
        timestamp=sent,
    )  # fmt: skip
    records = Records(delivery, "normal", type_name="echo", worker="w")
    task = parse_task(
        {"task_id": "t", "task_type": "echo", "payload": 1, "created_at": created and created.isoformat()}
    )
    assert records.seconds_queued(task, NOW) == seconds


def test_each_record_names_the_workers_track() -> None:
    delivery = Delivery(
        queue="inference.echo.normal", tag=1, epoch=1, body=b'{"task_id": "t", "nonsense": 1}', routing_key="",
        headers={}, redelivered=False,
    )  # fmt: skip
    records = Records(delivery, "normal", type_name="echo", worker="w", track="canary")
    task = parse_task({"task_id": "t", "task_type": "echo", "payload": 1})
    error = InvalidTask("bad")
    success = records.success(
        task, digest="d", started_at=NOW, artifacts=(), timings=Timings(), engine=None, cached=False
    )
    unreadable = records.unreadable(error, started_at=NOW)
    failure = records.failure(task, error, digest="d", started_at=NOW)
    assert [record and record.track for record in (success, failure, unreadable)] == ["canary"] * 3
