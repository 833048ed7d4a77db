"""The worker as a process, with a real broker, Redis, store and engine process."""

from __future__ import annotations

import json
import os
import re
import signal
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import pytest

from inferq.broker import DeadLetters, connect
from inferq.schemas import PRIORITIES, Result, parse_task
from inferq.schemas.errors import EXIT_CONFIG
from inferq.storage import ResultStore, StorageSettings, open_store
from tests.waiting import eventually
from tests.worker.conftest import DripServer, Site, WorkerProcess, starts


@pytest.mark.shared
def test_the_bare_message_of_any_producer_becomes_a_result(site: Site) -> None:
    site.worker("echo")
    task_id = site.publish({"task_id": "echo_001", "task_type": "echo", "payload": {"page": 1}})
    result = site.ended(task_id)
    assert result.status == "succeeded"
    assert result.output == {"payload": {"page": 1}}
    assert result.attempts == 1
    assert result.engine is not None
    assert result.engine.name == "echo"
    state = eventually(lambda: (s := site.state(task_id)) and s.ended and s)
    assert state.state == "succeeded"
    eventually(lambda: site.depth("inference.echo.normal") == 0)


@pytest.mark.shared
def test_every_lane_is_served(site: Site) -> None:
    site.worker("echo")
    for priority in PRIORITIES:
        task_id = site.publish(
            {"task_type": "echo", "priority": priority, "payload": 1}, key=f"task_type.echo.{priority}"
        )
        assert site.ended(task_id).status == "succeeded"


def test_artifacts_and_inputs_go_through_the_store(site: Site) -> None:
    site.worker()
    site.store.put("files/default/in.txt", b"from the store")
    task_id = site.publish({"fault": "artifact", "file_url": "inferq:in.txt"})
    result = site.ended(task_id)
    assert result.output == {"value": "from the store"}
    (artifact,) = result.artifacts
    assert (artifact.name, artifact.content_type, artifact.bytes) == ("note.txt", "text/plain", 6)
    assert site.store.get(site.results.artifact_key("default", task_id, "note.txt")) == b"a note"
    (scratch,) = (site.folder / "scratch").iterdir()
    eventually(lambda: [file.name for file in scratch.iterdir()] == [".lock"], what="a clean scratch folder")
    assert scratch.stat().st_mode & 0o077 == 0


@pytest.mark.shared
def test_a_large_output_becomes_an_artifact(site: Site) -> None:
    site.worker()
    result = site.ended(site.publish({"fault": "big"}))
    assert result.output is None
    (artifact,) = result.artifacts
    assert artifact.name == "output.json"
    stored = site.store.get(site.results.artifact_key("default", result.task_id, "output.json"))
    assert len(json.loads(stored)["value"]) == 2_000_000


def test_the_parent_is_light_and_loads_no_framework(site: Site) -> None:
    worker = WorkerProcess(site, "ocr", {}, forked=False)
    site.workers.append(worker)
    worker.wait_ready()
    parent = psutil.Process(worker.process.pid)
    maps = {Path(m.path).name for m in parent.memory_maps()}
    for framework in ("onnxruntime", "torch", "paddle", "cv2"):
        assert not [name for name in maps if framework in name], f"the parent has loaded {framework}"
    assert parent.memory_info().rss < 150 * 2**20
    (engine,) = parent.children()
    assert [m for m in engine.memory_maps() if "onnxruntime" in m.path]


MALFORMED = [
    (b"{not json", "not_json"),
    (b"\xff\xfe\x00", "not_json"),
    (b"[]", "invalid_task"),
    (b"", "not_json"),
    (b"[" * 30_000, "not_json"),
    (b'{"task_id": "m0", "task_type": "faulty", "tenant": []}', "invalid_task"),
    (b'{"task_id": "bad id!", "task_type": "faulty"}', "invalid_task"),
    (b'{"task_id": "r1", "task_type": "faulty", "surprise": 1}', "invalid_task"),
    (b'{"task_id": "r2", "task_type": "faulty", "options": {"surprise": 1}}', "invalid_task"),
    (b'{"task_id": "r3", "task_type": "nonsense"}', "unknown_task_type"),
    (b'{"task_id": "r4", "task_type": "echo"}', "wrong_queue"),
    (
        b'{"task_id": "r5", "task_type": "faulty", "metadata": {"x": "' + b"y" * 70_000 + b'"}}',
        "task_too_large",
    ),
    (b'{"task_id": "' + b"x" * 300 + b'", "task_type": "faulty"}', "invalid_task"),
    (b'{"task_id": "\\ud83d", "task_type": "faulty"}', "not_json"),
]
"""Each with the reason why it is refused; those with an id like `r1` get a record."""


@pytest.mark.shared
def test_a_malformed_message_is_dead_lettered_with_its_reason_and_stops_nobody(site: Site) -> None:
    site.worker()
    for body, _ in MALFORMED:
        site.publish(body, exchange="", key="inference.faulty.normal")
    assert site.ended(site.publish({})).status == "succeeded"
    eventually(lambda: len(site.dead()) == len(MALFORMED), what="a dead letter for each")
    for letter, (body, reason) in zip(site.dead(), MALFORMED, strict=True):
        assert letter.delivery.body == body
        assert letter.reason == reason
        assert letter.error
        assert letter.attempts == 1
        assert letter.worker
        assert letter.time is not None
        if named := re.search(rb'"(r\d)"', body):
            failure = site.ended(named[1].decode())
            assert failure.status == "failed"
            assert failure.error is not None
            assert failure.error.code == reason


@pytest.mark.shared
@pytest.mark.parametrize(
    ("line", "kept"),
    [({"batch_line": 7}, ("b", 7)), ({"batch_line": "seven"}, (None, None)), ({}, (None, None))],
)
def test_the_failure_of_an_unreadable_line_is_that_lines(
    site: Site, line: dict[str, Any], kept: tuple[str | None, int | None]
) -> None:
    site.worker()
    task_id = site.publish({"options": {"surprise": 1}, "batch_id": "b", **line})
    failure = site.ended(task_id)
    assert failure.error is not None
    assert failure.error.code == "invalid_task"
    assert (failure.batch_id, failure.batch_line) == kept


@pytest.mark.shared
def test_the_loser_of_an_id_that_two_tasks_have_is_dead_lettered(site: Site, tmp_path: Path) -> None:
    site.worker()
    options = {"gate": str(tmp_path / "gate"), "marker": str(tmp_path / "marker")}
    task_id = site.publish({"fault": "gate", "options": options})
    eventually(lambda: starts(tmp_path / "marker") == 1, what="the start of a task")
    other = Result(
        task_id=task_id, task_type="faulty", tenant="default", status="succeeded", attempts=1,
        digest="0" * 64, output={}, finished_at=datetime.now(UTC),
    )  # fmt: skip
    site.results.save(other)
    (tmp_path / "gate").touch()
    (letter,) = eventually(site.dead, what="a dead letter")
    assert (letter.reason, letter.task_id) == ("id_conflict", task_id)
    assert site.ended(task_id) == other


@pytest.mark.shared
def test_what_the_engine_calls_invalid_is_not_retried(site: Site) -> None:
    site.worker()
    task_id = site.publish({"fault": "invalid"})
    result = site.ended(task_id)
    assert result.status == "failed"
    assert result.attempts == 1
    assert result.error is not None
    assert (result.error.code, result.error.retryable) == ("never", False)
    (letter,) = eventually(site.dead)
    assert (letter.reason, letter.task_id) == ("never", task_id)
    assert site.depth("inference.retry.5s") == 0


@pytest.mark.shared
def test_what_may_pass_is_retried_after_a_while(site: Site, tmp_path: Path) -> None:
    site.worker()
    for fault in ("transient", "error", "memory", "bad_output", "missing_artifact"):
        marker = tmp_path / fault
        task_id = site.publish({"fault": fault, "options": {"times": 1, "marker": str(marker)}})
        state = eventually(lambda: (s := site.state(task_id)) and s.state == "retrying" and s)  # noqa: B023
        assert state.error is not None
        result = site.ended(task_id)
        assert (fault, result.status, result.attempts) == (fault, "succeeded", 2)
        assert starts(marker) == 2


def test_the_last_attempt_ends_in_a_failure_and_a_dead_letter_that_can_be_redriven(
    site: Site, tmp_path: Path
) -> None:
    site.worker(INFERQ_MAX_ATTEMPTS="1")
    task_id = site.publish(
        {"task_id": "t1", "fault": "transient", "options": {"times": 2, "marker": str(tmp_path / "m")}}
    )
    assert site.ended(task_id).status == "failed"
    eventually(site.dead)
    with DeadLetters(site.broker, "faulty") as letters:
        (moved,) = letters.redrive()
    assert moved.reason == "not_now"
    eventually(lambda: starts(tmp_path / "m") == 2)
    (letter,) = eventually(site.dead)
    assert letter.delivery.redrives == 1
    with DeadLetters(site.broker, "faulty") as letters:
        letters.redrive()
    result = eventually(
        lambda: (r := site.results.load("default", task_id)) and r.status == "succeeded" and r
    )
    assert result.redrives == 2
    state = eventually(lambda: (s := site.state(task_id)) and s.state == "succeeded" and s)
    assert state.error is None
    assert site.dead() == []


def test_an_engine_that_dies_costs_one_attempt_and_the_worker_goes_on(site: Site, tmp_path: Path) -> None:
    worker = site.worker()
    for deaths, fault in enumerate(("crash", "exit"), 1):
        marker = tmp_path / fault
        task_id = site.publish({"fault": fault, "options": {"times": 1, "marker": str(marker)}})
        other = site.publish({})
        assert site.ended(other).status == "succeeded"
        result = site.ended(task_id)
        assert (fault, result.status, result.attempts) == (fault, "succeeded", 2)
        assert f"inferq_engine_deaths_total {deaths}.0" in worker.get("/metrics").text


@pytest.mark.shared
def test_a_task_that_has_killed_three_engines_is_poison(site: Site) -> None:
    site.worker()
    task_id = site.publish({"fault": "crash"}, headers={"x-engine-deaths": 2, "x-attempt": 3})
    result = site.ended(task_id)
    assert result.error is not None
    assert result.error.code == "poison"
    (letter,) = eventually(site.dead)
    assert letter.reason == "poison"


@pytest.mark.shared
def test_a_run_over_its_time_limit_is_stopped(site: Site, tmp_path: Path) -> None:
    """An engine that asks whether it should stop goes on with its model; another is killed and replaced."""
    worker = site.worker()
    for fault, stays in (("hang", True), ("hang_hard", False), ("noise", False)):
        engine = worker.engine_pid()
        options = {"times": 1, "marker": str(tmp_path / fault)}
        task_id = site.publish({"fault": fault, "time_limit": 0.5, "options": options})
        state = eventually(lambda: (s := site.state(task_id)) and s.state == "retrying" and s)  # noqa: B023
        assert (fault, state.error.code) == (fault, "time_limit")
        assert site.ended(task_id).status == "succeeded"
        assert (fault, worker.engine_pid() == engine) == (fault, stays)


def test_the_operator_limits_the_time_that_a_task_may_ask_for(site: Site) -> None:
    site.worker(INFERQ_MAX_TIME_LIMIT="0.5", INFERQ_MAX_ATTEMPTS="1")
    error = site.ended(site.publish({"fault": "hang", "time_limit": 3600})).error
    assert error is not None
    assert error.code == "time_limit"
    assert "0.5 s" in error.message


@pytest.mark.shared
@pytest.mark.parametrize(("fault", "stays"), [("hang", True), ("hang_hard", False), ("noise", False)])
def test_a_running_task_can_be_cancelled(site: Site, tmp_path: Path, fault: str, stays: bool) -> None:
    """An engine that asks whether it should stop goes on with its model; another is killed and replaced."""
    worker = site.worker()
    engine = worker.engine_pid()
    task_id = site.publish({"fault": fault, "options": {"marker": str(tmp_path / "m")}})
    eventually(lambda: starts(tmp_path / "m") == 1)
    asked = datetime.now(UTC)
    site.status.request_cancel("default", task_id)
    result = site.ended(task_id)
    assert result.status == "cancelled"
    # Promised within a second or so; without the promise it would be the time limit, minutes later.
    assert (result.finished_at - asked).total_seconds() < 15
    assert site.dead() == []
    assert site.ended(site.publish({})).status == "succeeded"
    assert (worker.engine_pid() == engine) == stays


def test_a_queued_task_that_is_cancelled_never_starts(site: Site) -> None:
    message = {"task_id": "t1", "task_type": "echo", "payload": 1}
    site.status.submit(parse_task(message))
    site.status.request_cancel("default", "t1")
    site.publish(message)
    site.worker("echo")
    result = site.ended("t1")
    assert result.status == "cancelled"
    assert result.output is None
    assert result.timings.inference == 0
    assert site.depth("inference.dead.echo") == 0


@pytest.mark.shared
def test_progress_shows_while_it_runs(site: Site) -> None:
    site.worker()
    task_id = site.publish({"fault": "progress"})
    seen = []

    def ended() -> bool:
        if (state := site.state(task_id)) and state.progress is not None:
            seen.append(state.progress)
        return site.results.load("default", task_id) is not None

    eventually(ended)
    assert seen == sorted(seen)
    assert len(set(seen)) >= 3


@pytest.mark.shared
def test_the_same_task_many_times_has_one_result(site: Site, tmp_path: Path) -> None:
    site.worker()
    marker = tmp_path / "m"
    message = {"task_id": "twice", "options": {"marker": str(marker)}}
    for _ in range(10):
        site.publish(message)
    first = site.ended("twice")
    eventually(lambda: site.depth("inference.faulty.normal") == 0)
    site.publish(message)
    site.ended(site.publish({}))
    assert starts(marker) == 1
    assert site.results.load("default", "twice") == first


@pytest.mark.shared
def test_a_task_that_has_ended_no_longer_needs_its_input(site: Site) -> None:
    site.worker()
    site.store.put("files/default/in.txt", b"from the store")
    message = {"task_id": "ended", "fault": "artifact", "file_url": "inferq:in.txt"}
    site.publish(message)
    first = site.ended("ended")
    site.store.delete("files/default/in.txt")
    site.publish(message)
    site.ended(site.publish({}))
    assert site.dead() == []
    assert site.depth("inference.retry.5s") == 0
    assert site.results.load("default", "ended") == first


@pytest.mark.shared
def test_the_same_id_with_other_content_is_dead_lettered_and_changes_nothing(site: Site) -> None:
    site.worker()
    site.publish({"task_id": "mine", "metadata": {"a": 1}})
    first = site.ended("mine")
    site.publish({"task_id": "mine", "metadata": {"a": 2}})
    (letter,) = eventually(site.dead)
    assert letter.reason == "id_conflict"
    assert site.results.load("default", "mine") == first
    state = site.state("mine")
    assert state is not None
    assert state.state == "succeeded"


@pytest.mark.shared
def test_the_digest_that_a_task_was_accepted_with_is_its_own_to_the_end(site: Site, tmp_path: Path) -> None:
    site.worker()
    options = {"marker": str(tmp_path / "marker"), "times": 2}
    task = {"task_id": "accepted", "fault": "transient", "options": options}
    digest = "d" * 64  # not what this version would make of it
    site.publish(task, headers={"x-digest": digest})
    assert site.ended("accepted").digest == digest
    assert site.ended("accepted").attempts == 3
    site.publish(task, headers={"x-digest": digest})
    eventually(lambda: site.depth("inference.faulty.normal") == 0, what="an empty queue")
    assert site.ended(site.publish({})).status == "succeeded"
    assert starts(tmp_path / "marker") == 3
    assert site.dead() == []


def test_a_task_that_this_version_cannot_read_waits_for_a_worker_that_can(site: Site) -> None:
    worker = site.worker()
    newer = {"task_id": "newer", "options": {"from_a_later_version": 1}}
    site.publish(newer, headers={"x-digest": "d" * 64, "x-version": 2, "x-attempt": 2})
    eventually(lambda: worker.log.read_text().count("'newer'") >= 2, what="a task that is put off twice")
    assert worker.stop() == 0
    queue = "inference.faulty.normal"
    eventually(lambda: site.depth(queue) == 1, what="the task in its queue")
    connection = connect(site.broker, name="test")
    _, properties, body = connection.channel().basic_get(queue, auto_ack=True)
    connection.close()
    assert properties is not None
    assert body is not None
    assert json.loads(body)["options"] == {"from_a_later_version": 1}
    kept = {name: properties.headers[name] for name in ("x-digest", "x-version", "x-attempt")}
    assert kept == {"x-digest": "d" * 64, "x-version": 2, "x-attempt": 2}
    assert properties.headers["x-deferrals"] >= 2
    assert site.dead() == []
    assert site.results.load("default", "newer") is None


@pytest.mark.shared
def test_a_task_that_no_worker_can_read_ends_as_a_dead_letter_that_says_so(site: Site) -> None:
    site.worker()
    newer = {"task_id": "newer", "options": {"from_a_later_version": 1}}
    site.publish(newer, headers={"x-digest": "d" * 64, "x-version": 2, "x-deferrals": 24})
    failure = site.ended("newer")
    assert failure.error is not None
    assert (failure.error.code, failure.error.retryable) == ("unsupported_version", True)
    (letter,) = eventually(site.dead, what="a dead letter")
    assert (letter.task_id, letter.reason) == ("newer", "unsupported_version")


@pytest.mark.shared
def test_an_expired_task_ends_as_such(site: Site, tmp_path: Path) -> None:
    site.worker()
    marker = tmp_path / "m"
    task_id = site.publish({"expires_at": "2020-01-01T00:00:00Z", "options": {"marker": str(marker)}})
    result = site.ended(task_id)
    assert result.error is not None
    assert result.error.code == "expired"
    assert starts(marker) == 0


def test_two_slots_work_at_the_same_time(site: Site, tmp_path: Path) -> None:
    site.worker(INFERQ_SLOTS="2")
    markers, gate = [tmp_path / "first", tmp_path / "second"], tmp_path / "gate"
    tasks = [
        site.publish({"fault": "gate", "options": {"marker": str(marker), "gate": str(gate)}})
        for marker in markers
    ]
    eventually(lambda: all(starts(marker) == 1 for marker in markers), "both tasks in an engine")
    gate.touch()
    for task in tasks:
        assert site.ended(task).status == "succeeded"


def test_bad_settings_are_named(site: Site) -> None:
    worker = WorkerProcess(site, "echo", {"INFERQ_SLOTS": "many", "INFERQ_LANES": "urgent"})
    site.workers.append(worker)
    assert worker.process.wait(60) == EXIT_CONFIG
    said = worker.log.read_text()
    assert "INFERQ_SLOTS" in said
    assert "INFERQ_LANES" in said
    assert "Traceback" not in said


def test_without_redis_tasks_run_all_the_same(site: Site) -> None:
    worker = site.worker("echo", INFERQ_REDIS_URL="redis://127.0.0.1:1/0", INFERQ_REDIS_PATIENCE="1")
    tasks = [site.publish({"task_type": "echo", "payload": n}) for n in range(5)]
    assert [site.ended(task).output for task in tasks] == [{"payload": n} for n in range(5)]
    eventually(lambda: site.depth("inference.echo.normal") == 0)
    assert worker.ready()
    outages = next(
        line
        for line in worker.get("/metrics").text.splitlines()
        if line.startswith("inferq_status_outages_total")
    )
    assert float(outages.split()[1]) >= 5


def test_a_store_that_is_away_delays_the_task_and_burns_no_attempt(site: Site) -> None:
    store = site.folder / "store"
    worker = site.worker("echo")
    store.rename(site.folder / "away")
    store.write_text("a file where the folder should be")
    task_id = site.publish({"task_type": "echo", "payload": 1})
    eventually(lambda: not worker.ready())
    assert "object store" in worker.get("/readyz").text
    store.unlink()
    (site.folder / "away").rename(store)
    result = site.ended(task_id)
    assert (result.status, result.attempts) == ("succeeded", 1)
    eventually(worker.ready)


def test_results_and_artifacts_go_to_s3(site: Site, s3_url: str, bucket: str) -> None:
    place = {"INFERQ_STORE_URL": f"s3://{bucket}/some/prefix", "INFERQ_S3_ENDPOINT_URL": s3_url}
    worker = site.worker("faulty", **place)
    task_id = site.publish({"fault": "artifact"})
    store = open_store(StorageSettings(store_url=place["INFERQ_STORE_URL"], s3_endpoint_url=s3_url))
    results = ResultStore(store)
    result = eventually(lambda: results.load("default", task_id))
    assert result.status == "succeeded"
    (artifact,) = result.artifacts
    assert artifact.url.startswith(f"s3://{bucket}/some/prefix/tasks/default/{task_id}/")
    assert store.get(results.artifact_key("default", task_id, "note.txt")) == b"a note"
    assert psutil.Process(worker.process.pid).memory_info().rss < 150 * 2**20


def test_an_unreadable_result_is_not_overwritten(site: Site) -> None:
    site.store.put("tasks/default/t1/result.json", b"not a result")
    site.worker("echo")
    site.publish({"task_id": "t1", "task_type": "echo"})
    (letter,) = eventually(lambda: site.dead("echo"))
    assert letter.reason == "result_unreadable"
    assert site.store.get("tasks/default/t1/result.json") == b"not a result"


@pytest.mark.shared
def test_an_input_from_a_private_address_is_refused(site: Site) -> None:
    site.worker()
    for url in ("http://127.0.0.1:1/x", "http://169.254.169.254/latest/meta-data", "http://localhost/x"):
        result = site.ended(site.publish({"file_url": url}))
        assert result.error is not None
        assert result.error.code == "address_refused"
        assert result.attempts == 1


@pytest.mark.shared
def test_odd_headers_stop_nobody(site: Site) -> None:
    site.worker()
    odd: list[dict[str, object]] = [
        {"blob": "x" * 130_000},
        {"when": datetime(2026, 1, 1, tzinfo=UTC)},
        {"x-attempt": "first", "x-redrives": -1, "x-engine-deaths": [1]},
        {"x-attempt": 2**62, "x-redrives": 2**63 - 1},
    ]
    for headers in odd:
        site.publish(b"not json", key="task_type.faulty", headers=headers)
    assert site.ended(site.publish({})).status == "succeeded"
    eventually(lambda: [letter.reason for letter in site.dead()] == len(odd) * ["not_json"])
    with DeadLetters(site.broker, "faulty") as letters:
        assert len(letters.redrive()) == len(odd)
    eventually(lambda: [a.delivery.redrives >= 1 for a in site.dead()] == len(odd) * [True])


def test_a_slot_without_an_engine_leaves_the_tasks_to_others(site: Site, tmp_path: Path) -> None:
    switch = tmp_path / "load"
    lame = site.worker(FAULTY_LOAD=str(switch))
    switch.write_text("error")
    os.kill(lame.engine_pid(), signal.SIGKILL)
    eventually(lambda: "next start in" in lame.log.read_text())
    site.worker()
    for task in [site.publish({}) for _ in range(6)]:
        assert site.ended(task).status == "succeeded"


def test_a_cancel_reaches_a_download(site: Site) -> None:
    with DripServer() as server:
        site.worker(INFERQ_FETCH_ALLOWED_NETWORKS="127.0.0.0/8", INFERQ_FETCH_TIMEOUT="600")
        task_id = site.publish({"file_url": server.url})
        eventually(lambda: (s := site.state(task_id)) and s.state == "running")
        site.status.request_cancel("default", task_id)
        assert site.ended(task_id).status == "cancelled"


def test_what_a_killed_worker_left_in_scratch_is_swept(site: Site) -> None:
    first = site.worker()
    task_id = site.publish({"fault": "hang"})
    eventually(lambda: (s := site.state(task_id)) and s.state == "running")
    (left,) = (site.folder / "scratch").iterdir()
    first.discard()
    second = site.worker()
    assert left not in (site.folder / "scratch").iterdir()
    second.discard()


def test_ready_slots_are_counted(site: Site) -> None:
    worker = site.worker("echo", INFERQ_SLOTS="2")
    assert "inferq_worker_ready_slots 2.0" in worker.get("/metrics").text
