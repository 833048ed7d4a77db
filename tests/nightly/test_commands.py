"""`inferq nightly` and `inferq beat` as people and supervisors run them."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from inferq.broker import BrokerSettings, connect, topology_for
from inferq.producer.nightly import read_schedules
from inferq.producer.up.part import free_ports
from inferq.schemas import BatchCounts, BatchSummary
from inferq.storage import BatchIndex, BatchStore, LocalStore, StatusIndex, StorageSettings
from inferq.storage.nightly_runs import Run, RunLog, Snapshot
from tests.forked import ForkedPart
from tests.installation import inferq, inferq_here
from tests.waiting import eventually

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


class Desk:
    """A shell with the settings of the test's services, and a file of schedules."""

    def __init__(self, folder: Path, amqp_url: str, redis_url: str, s3_url: str, bucket: str) -> None:
        self.file = folder / "schedules.toml"
        self.store = LocalStore(folder / "store", fsync=False)
        self.bucket = bucket
        self.port = free_ports(1)[0]
        self.env = os.environ | {
            "INFERQ_AMQP_URL": amqp_url,
            "INFERQ_REDIS_URL": redis_url,
            "INFERQ_STORE_URL": (folder / "store").as_uri(),
            "INFERQ_S3_ENDPOINT_URL": s3_url,
            "INFERQ_FETCH_S3_BUCKETS": bucket,
            "INFERQ_SCHEDULES_FILE": str(self.file),
        }
        self.connection = connect(BrokerSettings(amqp_url=amqp_url), name="test")
        self.channel = self.connection.channel()
        topology_for(["echo"]).apply(self.channel)
        self.write()

    def write(self, **more: str) -> None:
        said = {
            "cron": "30 1 * * *",
            "time_zone": "Europe/Berlin",
            "source": f"s3://{self.bucket}/in/",
            "task_type": "ocr",
        }
        lines = [f"{key} = {json.dumps(value)}" for key, value in (said | more).items()]
        self.file.write_text("\n".join(["[invoices]", *lines]), encoding="utf-8")

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return inferq_here(self.env, *arguments)

    def sent(self) -> list[tuple[str, str]]:
        """The jobs in the queue, and what they are about; they are taken out."""
        found = []
        while (got := self.channel.basic_get("inference.batches", auto_ack=True))[0] is not None:
            found.append((got[1].headers["task"], got[1].headers["id"]))
        return found

    @contextmanager
    def beating(self) -> Iterator[ForkedPart]:
        """A beat that is ready; killed where it still runs."""
        process = ForkedPart("beat", env=self.env | {"INFERQ_PROBE_PORT": str(self.port)})
        try:
            eventually(self._ready)
            yield process
        finally:
            process.kill()
            process.wait()

    def _ready(self) -> bool:
        try:
            answer = httpx.get(f"http://127.0.0.1:{self.port}/readyz", timeout=60, verify=False)
            return answer.status_code == 200
        except httpx.TransportError:
            return False


@pytest.fixture
def desk(
    tmp_path: Path, fresh_amqp_url: str, redis_url: str, s3_url: str, aws: None, bucket: str
) -> Iterator[Desk]:
    desk = Desk(tmp_path, fresh_amqp_url, redis_url, s3_url, bucket)
    yield desk
    desk.connection.close()


def test_check_shows_the_next_starts_and_whether_the_source_can_be_read(desk: Desk, s3: S3Client) -> None:
    empty = inferq(desk.env, "nightly", "check")
    assert empty.returncode == 0
    assert "it is empty now" in empty.stdout
    s3.put_object(Bucket=desk.bucket, Key="in/a", Body=b"x")
    found = desk.run("nightly", "check", "--json")
    assert found.returncode == 0, found.stderr
    (facts,) = json.loads(found.stdout)
    assert len(facts["next"]) == 5
    for start in facts["next"]:
        assert "01:30 CE" in start["local"]
        assert start["utc"].endswith(("00:30 UTC", "23:30 UTC"))


def test_check_fails_where_a_source_cannot_be_read(desk: Desk) -> None:
    desk.write(source="s3://elsewhere/in/")
    found = desk.run("nightly", "check")
    assert found.returncode == 1
    assert "INFERQ_FETCH_S3_BUCKETS" in found.stderr
    desk.env["INFERQ_FETCH_S3_BUCKETS"] = "elsewhere"
    found = desk.run("nightly", "check")
    assert found.returncode == 1
    assert "'elsewhere' does not exist" in found.stderr


def test_check_fails_where_a_file_of_tasks_is_not_there(desk: Desk, s3: S3Client) -> None:
    desk.write(source=f"s3://{desk.bucket}/in.jsonl")
    s3.put_object(Bucket=desk.bucket, Key="in.jsonl.old", Body=b"{}")
    found = desk.run("nightly", "check")
    assert found.returncode == 1
    assert f"there is no s3://{desk.bucket}/in.jsonl" in found.stderr
    s3.put_object(Bucket=desk.bucket, Key="in.jsonl", Body=b"{}")
    assert desk.run("nightly", "check").returncode == 0


def test_check_names_the_bucket_that_may_not_be_listed(desk: Desk, forbidding_s3: str) -> None:
    desk.env["INFERQ_S3_ENDPOINT_URL"] = forbidding_s3
    found = desk.run("nightly", "check")
    assert found.returncode == 1
    assert f"invoices: bucket '{desk.bucket}'" in found.stderr
    assert "the credentials need s3:ListBucket and s3:GetObject" in found.stderr


@pytest.mark.parametrize("command", [("nightly", "check"), ("beat",)])
def test_a_fault_in_the_file_ends_every_command_with_its_words(desk: Desk, command: tuple[str, ...]) -> None:
    desk.write(cron="0 0 31 2 *")
    found = desk.run(*command)
    assert found.returncode == 1
    assert "invoices.cron: '0 0 31 2 *' never fires" in found.stderr


def test_run_starts_a_run_by_its_name_and_time(desk: Desk) -> None:
    found = desk.run("nightly", "run", "invoices", "--at", "2025-11-25T01:30:00.25")
    assert found.stdout == "started invoices-20251125T003000Z\n"
    body = desk.channel.basic_get("inference.batches", auto_ack=True)[2]
    assert body is not None
    # The same id has the same time, to the microsecond: another one would be another batch's.
    assert json.loads(body)[1]["scheduled_at"] == "2025-11-25T00:30:00+00:00"
    desk.write(cron="30 2 * * *")
    skipped = desk.run("nightly", "run", "invoices", "--at", "2025-03-30T02:30")  # the clock jumps at 2
    assert skipped.stdout == "started invoices-20250330T010000Z\n"
    assert desk.sent() == [("nightly.start", "invoices-20250330T010000Z")]
    unknown = desk.run("nightly", "run", "letters")
    assert unknown.returncode == 1
    assert "there is no schedule 'letters'; known schedules: invoices" in unknown.stderr


def test_run_refuses_a_time_that_the_cron_has_not(desk: Desk) -> None:
    found = desk.run("nightly", "run", "invoices", "--at", "2025-11-25T01:31")
    assert found.returncode == 1
    assert "2025-11-25T01:31+01:00 is not a time of the cron '30 1 * * *'" in found.stderr
    assert "the time before it is 2025-11-25T01:30+01:00" in found.stderr
    assert desk.sent() == []


def test_run_says_that_a_run_was_started_before(desk: Desk) -> None:
    moment = datetime(2025, 11, 25, 0, 30, tzinfo=UTC)
    again = ("nightly", "run", "invoices", "--at", "2025-11-25T01:30")
    run_id = "invoices-20251125T003000Z"
    _started(desk, moment)
    # What had lost its job, with the broker's disk perhaps, is gone on with.
    assert desk.run(*again).stdout == f"{run_id} was started before; it continues, and repeats no task\n"
    assert desk.sent() == [("nightly.start", run_id)]
    _ended(desk, run_id, moment, BatchCounts(total=0))
    assert desk.run(*again).stdout == f"{run_id} has ended already; nothing was started\n"
    assert desk.sent() == []


def test_run_says_when_a_run_outside_its_window_is_fed(desk: Desk) -> None:
    now = datetime.now(UTC)
    opens, closes = (f"{now + timedelta(hours=hours):%H:%M}" for hours in (2, 3))
    desk.write(window=f"{opens}-{closes}", time_zone="UTC")
    said = desk.run("nightly", "run", "invoices").stdout
    assert said.startswith("queued invoices-")
    assert said.endswith(f"; outside its window: it feeds from {opens} UTC\n")
    facts = json.loads(desk.run("nightly", "run", "invoices", "--json").stdout)
    assert datetime.fromisoformat(facts["feeds_from"]).strftime("%H:%M") == opens


def test_run_says_at_once_that_the_broker_is_away(desk: Desk) -> None:
    desk.env["INFERQ_AMQP_URL"] = f"amqp://127.0.0.1:{desk.port}/"
    desk.env["INFERQ_PUBLISH_TIMEOUT"] = "600"
    found = inferq(desk.env, "nightly", "run", "invoices")
    assert found.returncode == 1
    (line,) = found.stderr.splitlines()
    assert "cannot be reached" in line


@pytest.mark.parametrize(
    "at", ["0001-01-01T00:00:00+14:00", "0001-01-01T00:00:00", "9999-12-31T23:59:59-14:00", "soon"]
)
def test_a_time_that_there_is_not_is_refused_with_words(desk: Desk, at: str) -> None:
    found = desk.run("nightly", "run", "invoices", "--at", at)
    assert found.returncode == 1
    assert f"--at '{at}' is not a date and time" in found.stderr
    assert desk.sent() == []


def test_a_run_of_a_time_to_come_is_left_to_beat(desk: Desk) -> None:
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    found = desk.run("nightly", "run", "invoices", "--at", tomorrow.isoformat())
    assert found.returncode == 1
    assert "is in the future" in found.stderr
    assert desk.sent() == []


def test_list_says_when_each_starts_and_what_became_of_its_last_run(desk: Desk) -> None:
    (fresh,) = json.loads(desk.run("nightly", "list", "--json").stdout)
    assert fresh["next"].endswith(("01:30+01:00", "01:30+02:00"))
    assert "last_run" not in fresh or fresh["last_run"] is None
    _started(desk, datetime(2026, 11, 25, 0, 30, tzinfo=UTC))
    (after,) = json.loads(desk.run("nightly", "list", "--json").stdout)
    assert (after["last_run"], after["state"]) == ("invoices-20261125T003000Z", "starting")


def test_list_counts_what_became_of_the_tasks_of_the_last_run(desk: Desk) -> None:
    desk.write(window="01:00-06:00")
    moment = datetime(2026, 11, 25, 0, 30, tzinfo=UTC)
    _started(desk, moment)
    run_id = "invoices-20261125T003000Z"
    index = BatchIndex(StatusIndex.from_settings(StorageSettings(redis_url=desk.env["INFERQ_REDIS_URL"])))
    index.set_state("default", run_id, "paused")

    def facts() -> dict[str, Any]:
        (found,) = json.loads(desk.run("nightly", "list", "--json").stdout)
        return {name: found.get(name) for name in ("state", "total", "succeeded", "failed", "invalid")}

    # Of its lines nothing is known yet: nought would be a lie.
    unknown = dict.fromkeys(("total", "succeeded", "failed", "invalid"))
    assert facts() == {"state": "paused: until 01:00 Europe/Berlin"} | unknown
    counts = BatchCounts(total=3, failed=2, invalid=1)
    _ended(desk, run_id, moment, counts)
    assert facts() == {"state": "completed", "total": 3, "succeeded": 0, "failed": 2, "invalid": 1}
    heads, row = desk.run("nightly", "list").stdout.splitlines()
    assert heads.split()[-4:] == ["total", "succeeded", "failed", "invalid"]
    assert row.split()[-4:] == ["3", "0", "2", "1"]


def test_list_tells_of_a_run_that_failed_not_of_the_batch_that_has_its_id(desk: Desk) -> None:
    _started(desk, datetime(2026, 11, 25, 0, 30, tzinfo=UTC))
    log = RunLog(desk.store, "default", "invoices")
    log.settle("invoices-20261125T003000Z", Snapshot(token="t", error="the id is taken"))
    now = datetime.now(UTC)
    BatchStore(desk.store).finish(
        BatchSummary(
            batch_id="invoices-20261125T003000Z", tenant="default", state="completed",
            counts=BatchCounts(total=1, succeeded=1), seconds=1.0, tasks_per_second=1.0,
            created_at=now, finished_at=now,
        )
    )  # fmt: skip
    (listed,) = json.loads(desk.run("nightly", "list", "--json").stdout)
    assert listed["state"] == "failed: the id is taken"


def _started(desk: Desk, moment: datetime) -> None:
    schedule = read_schedules(desk.file)["invoices"]
    batch = schedule.batch(moment)
    log = RunLog(desk.store, "default", "invoices")
    log.claim(Run(run_id=batch.batch_id, scheduled_at=moment, schedule=schedule))


def _ended(desk: Desk, run_id: str, moment: datetime, counts: BatchCounts) -> None:
    BatchStore(desk.store).finish(
        BatchSummary(
            batch_id=run_id, tenant="default", state="completed", counts=counts, seconds=1.0,
            tasks_per_second=2.0, created_at=moment, finished_at=moment,
        )
    )  # fmt: skip


def test_a_beat_that_is_killed_catches_up_when_it_is_back_and_starts_nothing_twice(desk: Desk) -> None:
    now = datetime.now(UTC)
    missed = now - timedelta(minutes=10)
    desk.write(cron=f"{missed:%M} * * * *", time_zone="UTC")
    schedule = read_schedules(desk.file)["invoices"]
    RunLog(desk.store, "default", "invoices").known(now - timedelta(hours=5), schedule)
    run_id = f"invoices-{missed:%Y%m%dT%H%M}00Z"
    with desk.beating():
        assert desk.sent() == [("nightly.start", run_id)]
    # Killed, and nobody has worked on that job: for all that beat can know it was never sent.
    with desk.beating():
        assert desk.sent() == [("nightly.start", run_id)]
    _started(desk, missed.replace(second=0, microsecond=0))
    with desk.beating() as beat:
        assert desk.sent() == []
        beat.terminate()
        assert beat.wait(20) == 0
