"""What each night of a run came to, over several nights of a made-up clock, from real records in a folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest

from inferq.broker import BrokerSettings, Message
from inferq.consumers.batches.services import BatchServices
from inferq.consumers.batches.settings import BatchSettings
from inferq.consumers.nightly.jobs import Watcher
from inferq.consumers.nightly.night import Ended, ended_between
from inferq.schemas import BatchCounts, BatchSummary, EndState, ErrorInfo, Night, Result
from inferq.schemas.schedule import Schedule
from inferq.storage import BatchSource, ObjectStore, StorageSettings
from inferq.storage.nightly_runs import Run, RunLog

START = "2026-11-25T01:30"
EVER = datetime(1970, 1, 1, tzinfo=UTC), datetime(9999, 1, 1, tzinfo=UTC)


def at(clock: str) -> datetime:
    """A moment of Berlin's winter."""
    return datetime.fromisoformat(f"{clock}+01:00").astimezone(UTC)


@dataclass(frozen=True)
class Recording(BatchServices):
    """Surroundings whose broker only takes down what it is given."""

    sent: list[Message] = field(default_factory=list)

    def confirm(self, message: Message) -> None:
        self.sent.append(message)


class Nights:
    """One run of a schedule, whose tasks end when the test says."""

    def __init__(self, folder: Path, **more: Any) -> None:
        self._folder = folder
        storage = StorageSettings(store_url=folder.as_uri(), store_fsync=False)
        self.services = Recording(BatchSettings(), storage, BrokerSettings())
        said = {
            "name": "scans", "cron": "30 1 * * *", "time_zone": "Europe/Berlin", "source": "s3://scans/in/",
            "task_type": "ocr", "window": "01:00-06:00", "callback": "https://example.com/nights", **more,
        }  # fmt: skip
        self.schedule = Schedule.model_validate({k: v for k, v in said.items() if v is not None})
        made = self.schedule.batch(at(START)).model_copy(update={"created_at": at(START)})
        self.batch = self.services.batches.create(made)
        self.run = Run(run_id=self.batch.batch_id, scheduled_at=at(START), schedule=self.schedule)

    def look(self, since: datetime, now: str) -> datetime | None:
        return Watcher(self.services, self.run).look(since, at(now))

    def ends(
        self,
        line: int,
        clock: str,
        *,
        pages: int = 1,
        code: str | None = None,
        status: str = "failed",
        task_id: str | None = None,
    ) -> None:
        """The task of a line ends then."""
        task_id = task_id or self.batch.task_id(line)
        result = Result(
            task_id=task_id, task_type="ocr", tenant="default", attempts=1, finished_at=at(clock),
            batch_id=self.batch.batch_id, batch_line=line, digest="d",
            status=cast(EndState, status) if code else "succeeded",
            output=None if code else {"pages": [{}] * pages},
            error=ErrorInfo(code=code, message="", retryable=False) if code else None,
        )  # fmt: skip
        self.services.results.save(result)
        name = "failure.json" if code else "result.json"
        os.utime(self.path(task_id, name), (at(clock).timestamp(),) * 2)

    def takes(self, lines: int) -> None:
        """The source is known to have so many lines."""
        self.services.batches.keep_source(
            "default", self.batch.batch_id, BatchSource(key="lines", lines=lines)
        )

    def path(self, task_id: str, name: str) -> Path:
        return self._folder / "tasks" / "default" / task_id / name

    def over(self, clock: str, *, state: str = "completed", **more: Any) -> None:
        counts = more.pop("counts")
        self.services.batches.finish(
            BatchSummary.model_validate(
                {
                    "batch_id": self.batch.batch_id, "tenant": "default", "state": state, "seconds": 1.0,
                    "counts": BatchCounts(**counts), "tasks_per_second": 1.0, "schedule": "scans",
                    "created_at": at(START), "finished_at": at(clock), **more,
                }
            )
        )  # fmt: skip

    @property
    def told(self) -> list[dict[str, Any]]:
        """The data of each callback that was handed to the broker."""
        return [json.loads(callback["body"])["data"] for callback in self.callbacks]

    @property
    def callbacks(self) -> list[dict[str, Any]]:
        return [json.loads(message.body)[1]["callback"] for message in self.services.sent]


MakeNights = Callable[..., Nights]


@pytest.fixture
def nights(tmp_path: Path) -> MakeNights:
    return lambda **more: Nights(tmp_path / "store", **more)


def test_each_night_is_told_by_its_own_day_and_all_add_up_to_the_run(nights: MakeNights) -> None:
    run = nights()
    run.ends(1, "2026-11-25T02:00", pages=3)
    run.ends(2, "2026-11-25T05:59", code="not_an_image")
    first = run.look(at(START), "2026-11-25T06:00:05")
    run.ends(3, "2026-11-26T01:10", pages=4)
    assert first is not None
    second = run.look(first, "2026-11-26T06:00:05")
    run.ends(4, "2026-11-27T01:00:30", pages=2)
    run.over(
        "2026-11-27T01:01",
        counts={"total": 5, "succeeded": 3, "failed": 1, "invalid": 1},
        failures={"not_an_image": 1, "bad_task": 1},
        pages=9,
    )
    assert second is not None
    assert run.look(second, "2026-11-27T01:01:10") is None

    assert [night["night"] for night in run.told] == ["2026-11-25", "2026-11-26", "2026-11-27"]
    assert [night["state"] for night in run.told] == ["paused", "paused", "completed"]
    assert [night["succeeded"] for night in run.told] == [1, 1, 1]
    assert [night["failed"] for night in run.told] == [1, 0, 0]
    assert [night["failures"] for night in run.told] == [{"not_an_image": 1}, {}, {"bad_task": 1}]
    assert [night["pages"] for night in run.told] == [3, 4, 2]
    hour = 3600
    assert [night["seconds"] for night in run.told] == [4.5 * hour, 5 * hour, 60]
    assert run.told[2]["pages_per_second"] == pytest.approx(2 / 60, abs=0.001)


def test_pages_count_in_an_output_that_is_an_artifact_and_a_spoilt_record_is_a_failure(
    nights: MakeNights, tmp_path: Path
) -> None:
    run = nights()
    run.ends(1, "2026-11-25T02:00", pages=3)
    run.ends(2, "2026-11-25T02:00", code="not_an_image")
    large = tmp_path / "output.json"
    large.write_text(json.dumps({"pages": [{}] * 400}))
    results, store = run.services.results, run.services.store
    first, second, third = (run.batch.task_id(line) for line in (1, 2, 3))
    artifact = results.save_artifact("default", third, "output.json", large, "application/json", run="1-a")
    kept = results.load("default", first)
    assert kept is not None
    results.save(kept.model_copy(update={"task_id": third, "output": None, "artifacts": (artifact,)}))
    store.put(f"tasks/default/{second}/failure.json", b"spoilt")
    ended = list(ended_between(store, run.batch, *EVER, readers=2))
    assert sorted(ended, key=lambda end: end.pages or 0) == [
        Ended("failed", "result_unreadable"), Ended("succeeded", None, 3), Ended("succeeded", None, 400),
    ]  # fmt: skip


def test_lines_with_ids_of_their_own_count_where_the_result_is_theirs(nights: MakeNights) -> None:
    run = nights()
    run.services.store.put("lines", b'{"task_id": "mine"}\n{}\n{"task_id": "mine"}\n{"task_id": "foreign"}\n')
    run.services.store.put("taken", b"[3,1]\n")
    source = BatchSource(key="lines", gzip=False, lines=4, blank=0, taken="taken", own_ids=True)
    run.services.batches.keep_source("default", run.batch.batch_id, source)
    run.ends(1, "2026-11-25T02:00", task_id="mine", pages=5)
    run.ends(2, "2026-11-25T03:00")
    other = Result(
        task_id="foreign", task_type="ocr", tenant="default", attempts=1, finished_at=at("2026-11-25T02:00"),
        status="succeeded", digest="d", output={},
    )  # fmt: skip
    run.services.results.save(other)
    store_clock = at("2026-11-25T02:00").timestamp()
    os.utime(run.path("foreign", "result.json"), (store_clock, store_clock))
    run.look(at(START), "2026-11-25T06:00:05")
    (told,) = run.told
    assert (told["succeeded"], told["pages"], told["total"]) == (2, 6, 4)


def test_a_line_with_an_id_of_its_own_costs_the_same_however_many_artifacts_it_has(
    nights: MakeNights, keys_listed: Callable[[ObjectStore], list[str]]
) -> None:
    run = nights()
    run.ends(1, "2026-11-25T02:00", task_id="mine", pages=5)
    store = run.services.store
    for number in range(30):
        store.put(f"tasks/default/mine/artifacts/1-a/{number}", b"")
    listed = keys_listed(store)
    (end,) = ended_between(store, run.batch, *EVER, readers=2, own_ids=["mine"])
    assert (end.status, end.pages) == ("succeeded", 5)
    assert listed == ["tasks/default/mine/result.json"]


def test_a_task_that_was_redriven_ends_once_and_when_it_succeeds(nights: MakeNights) -> None:
    run = nights()
    run.ends(1, "2026-11-25T02:00", code="out_of_memory")
    run.ends(1, "2026-11-25T03:00", pages=2)
    run.ends(2, "2026-11-25T02:00", code="out_of_memory")
    run.ends(2, "2026-11-25T12:00", pages=3)  # by day, before the night is told
    first = run.look(at(START), "2026-11-25T12:10")
    assert first is not None
    run.look(first, "2026-11-26T06:00:05")
    assert [night["succeeded"] for night in run.told] == [1, 1]
    assert [night["failed"] for night in run.told] == [0, 0]
    assert [night["pages"] for night in run.told] == [2, 3]


def test_what_was_cancelled_is_no_failure(nights: MakeNights) -> None:
    run = nights()
    run.ends(1, "2026-11-25T02:00", code="cancelled", status="cancelled")
    run.ends(2, "2026-11-25T02:00", code="not_an_image")
    run.look(at(START), "2026-11-25T06:00:05")
    assert [(night["cancelled"], night["failed"]) for night in run.told] == [(1, 1)]
    assert run.told[0]["failures"] == {"not_an_image": 1}


def test_a_look_that_is_repeated_tells_the_same_to_the_byte(nights: MakeNights) -> None:
    run = nights()
    run.ends(1, "2026-11-25T02:00")
    run.look(at(START), "2026-11-25T06:00:05")
    run.ends(2, "2026-11-25T05:00")  # listed late
    run.look(at(START), "2026-11-25T06:00:20")
    first, again = run.callbacks
    assert first == again
    assert first["event"] == "nightly.summary"


def test_while_its_window_is_open_nothing_is_told(nights: MakeNights) -> None:
    run = nights()
    run.ends(1, "2026-11-25T02:00")
    assert run.look(at(START), "2026-11-25T05:59:59") == at(START)
    assert not run.told


def test_a_night_in_which_nothing_ended_is_told_once(nights: MakeNights) -> None:
    run = nights()
    assert run.look(at(START), "2026-11-25T07:00") == at("2026-11-25T06:00")
    (told,) = run.told
    assert (told["night"], told["state"], told["total"]) == ("2026-11-25", "paused", None)
    assert (told["succeeded"], told["failed"], told["seconds"]) == (0, 0, 4.5 * 3600)
    run.takes(1)
    run.ends(1, "2026-11-25T05:59")  # listed late
    run.look(at(START), "2026-11-25T07:00")
    first, again = run.callbacks
    assert first == again


def test_a_night_in_which_nothing_ended_is_told_for_as_long_as_tasks_are_left(nights: MakeNights) -> None:
    run = nights()
    run.takes(3)
    run.ends(1, "2026-11-25T02:00", code="out_of_memory")
    run.ends(2, "2026-11-25T02:00", code="out_of_memory")
    run.look(at(START), "2026-11-25T06:00:05")
    run.ends(1, "2026-11-26T02:00")  # redriven: it counts in both nights
    run.look(at("2026-11-25T06:00"), "2026-11-26T06:00:05")
    run.look(at("2026-11-26T06:00"), "2026-11-27T06:00:05")
    run.ends(3, "2026-11-27T12:00")
    run.look(at("2026-11-27T06:00"), "2026-11-28T06:00:05")
    run.look(at("2026-11-28T06:00"), "2026-11-29T06:00:05")  # all have ended, and are put together
    assert [night["night"] for night in run.told] == [
        "2026-11-25", "2026-11-26", "2026-11-27", "2026-11-28",
    ]  # fmt: skip
    assert [night["succeeded"] + night["failed"] for night in run.told] == [2, 1, 0, 1]


def test_a_run_that_takes_nothing_has_no_night_to_tell(nights: MakeNights) -> None:
    run = nights()
    run.takes(0)
    run.look(at(START), "2026-11-25T06:00:05")
    assert not run.told


def test_a_window_that_closes_as_a_run_begins_or_before_is_no_night_of_it(nights: MakeNights) -> None:
    run = nights(window="22:00-01:30")  # due at 01:30
    run.takes(1)
    behind = at("2026-11-25T01:29:59")  # by the clock of who started it
    assert run.look(behind, "2026-11-25T02:00") == at(START)
    assert run.look(at("2026-11-25T07:00"), "2026-11-25T12:00") == at("2026-11-25T07:00")
    assert not run.told
    run.look(at(START), "2026-11-26T02:00")
    assert [night["night"] for night in run.told] == ["2026-11-25"]


def test_what_ends_by_day_after_its_night_was_told_has_a_summary_of_its_own(nights: MakeNights) -> None:
    run = nights()
    run.ends(1, "2026-11-25T05:00")
    closed = run.look(at(START), "2026-11-25T06:00:05")
    run.over("2026-11-25T12:00", state="cancelled", counts={"total": 9, "succeeded": 1, "cancelled": 8})
    assert closed is not None
    assert run.look(closed, "2026-11-25T12:00:10") is None
    assert [night["night"] for night in run.told] == ["2026-11-25", "2026-11-25-end"]
    assert [night["cancelled"] for night in run.told] == [0, 8]
    assert len({callback["callback_id"] for callback in run.callbacks}) == 2


def test_a_window_over_midnight_is_the_night_of_the_day_on_which_it_opened(nights: MakeNights) -> None:
    run = nights(window="22:00-06:00")
    run.ends(1, "2026-11-25T02:00")
    run.look(at(START), "2026-11-25T06:00:05")
    assert [night["night"] for night in run.told] == ["2026-11-24"]


def test_a_run_that_ends_before_its_window_opens_is_told_by_its_own_day(nights: MakeNights) -> None:
    run = nights(window="22:00-01:00")  # due at 01:30
    run.over("2026-11-25T01:31", counts={"total": 0})
    run.look(at(START), "2026-11-25T01:31:10")
    assert [night["night"] for night in run.told] == ["2026-11-25"]


def test_a_run_without_a_window_is_one_night_however_long_it_takes(nights: MakeNights) -> None:
    run = nights(window=None)
    run.ends(1, "2026-11-25T02:00")
    assert run.look(at(START), "2026-11-26T12:00") == at(START)
    run.over("2026-11-26T13:00", counts={"total": 1, "succeeded": 1}, pages=1)
    assert run.look(at(START), "2026-11-26T13:00:10") is None
    assert [(night["night"], night["succeeded"]) for night in run.told] == [("2026-11-25", 1)]


def test_without_a_callback_the_night_is_on_record_all_the_same(nights: MakeNights) -> None:
    run = nights(callback=None)
    run.over("2026-11-25T03:00", counts={"total": 0})
    assert run.look(at(START), "2026-11-25T03:00:10") is None
    assert not run.told
    log = RunLog(run.services.store, "default", "scans")
    assert [night.night for night in log.nights(run.run.run_id, Night)] == ["2026-11-25"]


def test_a_run_with_very_many_reasons_stays_within_a_callback(nights: MakeNights) -> None:
    run = nights()
    reasons = {f"reason_{number:04}" + "x" * 200: 1 for number in range(500)}
    run.over("2026-11-25T03:00", counts={"total": 500, "failed": 500}, failures=reasons, error="e" * 30_000)
    assert run.look(at(START), "2026-11-25T03:00:10") is None
    assert run.told[0]["failed"] == 500
