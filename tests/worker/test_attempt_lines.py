"""Every attempt ends in one line that says how; no text of the task is in any line."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from structlog.contextvars import bound_contextvars, get_contextvars

from inferq.broker import Delivery
from inferq.consumers.runtime.messages import Done, Failed
from inferq.consumers.worker.services import WorkerServices
from inferq.consumers.worker.settings import WorkerSettings
from tests.logged import logged
from tests.waiting import eventually
from tests.worker.test_last_resort import services, settled

__all__ = ["services"]

TRACE = "0af7651916cd43dd8448eb211c80319c"
TASK = {"task_id": "b.7", "task_type": "echo", "payload": "planted", "batch_id": "b", "batch_line": 7}
DELIVERY = Delivery(
    queue="inference.echo.normal", tag=1, epoch=1, body=json.dumps(TASK).encode(),
    routing_key="task_type.echo.normal", headers={"traceparent": f"00-{TRACE}-b7ad6b7169203331-01", "x-attempt": 5},
    redelivered=False, message_id="b.7",
)  # fmt: skip
CONTEXT = {
    "task_id": "b.7", "task_type": "echo", "tenant": "default", "attempt": 5, "batch_id": "b", "trace_id": TRACE,
}  # fmt: skip
INVALID = Failed(code="bad_text", message="'planted' is no text", invalid=True, seconds=0.5)
TRANSIENT = Failed(code="not_now", message="'planted' is busy", invalid=False, seconds=0.5)


def run(
    services: WorkerServices, delivery: Delivery, answer: object, track: str = ""
) -> list[dict[str, Any]]:
    """The lines of the worker, and the last of them."""
    services.settings = WorkerSettings(worker_name="w1", max_attempts=5, track=track)
    with logged("inferq") as lines:
        settled(services, delivery, lambda _task: None, run=lambda *_given, **_named: answer)
    assert "planted" not in str(lines)
    return lines


@pytest.mark.parametrize(
    ("answer", "outcome", "code", "warnings"),
    [
        (Done(output=b'{"payload": "planted"}', seconds=0.5), "succeeded", None, 0),
        (INVALID, "failed", "bad_text", 1),
        (TRANSIENT, "failed", "not_now", 1),
    ],
)
def test_an_attempt_ends_in_one_line(
    services: WorkerServices,
    answer: object,
    outcome: str,
    code: str | None,
    warnings: int,
) -> None:
    *others, last = run(services, DELIVERY, answer)
    assert [line["level"] for line in others] == ["WARNING"] * warnings
    for line in (*others, last):
        assert line.items() >= CONTEXT.items()
    assert (last["level"], last["message"], last["outcome"]) == ("INFO", f"attempt {outcome}", outcome)
    assert (last.get("error_code"), last["worker"], last["queue"]) == (code, "w1", DELIVERY.queue)
    assert last.get("stage") == (None if code is None else "inference")
    assert last["inference_seconds"] == 0.5
    assert last["fetch_seconds"] + last.get("upload_seconds", 0) <= last["seconds"] < 60


@pytest.mark.parametrize("answer", [Done(output=b"{}", seconds=0.5), INVALID, TRANSIENT])
def test_an_attempt_and_its_record_name_the_workers_track(services: WorkerServices, answer: object) -> None:
    last = run(services, DELIVERY, answer, track="canary")[-1]
    assert last["track"] == "canary"
    result = services.results.load("default", "b.7")
    assert result is not None
    assert result.track == "canary"


def test_without_a_track_none_is_named(services: WorkerServices) -> None:
    assert "track" not in run(services, DELIVERY, INVALID)[-1]
    result = services.results.load("default", "b.7")
    assert result is not None
    assert result.track is None


@pytest.mark.parametrize("header", ["", "00-planted-01", f"00-{'0' * 32}-b7ad6b7169203331-01"])
def test_a_broken_traceparent_is_no_trace_id(
    services: WorkerServices,
    header: str,
) -> None:
    (line,) = run(
        services, replace(DELIVERY, headers={"traceparent": header}), Done(output=b"{}", seconds=0.1)
    )
    assert "trace_id" not in line
    assert line["attempt"] == 1


def test_what_is_no_task_is_refused_by_its_code(services: WorkerServices) -> None:
    body = json.dumps({**TASK, "planted": "planted", "priority": "planted"}).encode()
    warning, last = run(services, replace(DELIVERY, body=body), INVALID)
    assert warning["message"].endswith(": refused: invalid_task")
    assert (last["outcome"], last["error_code"]) == ("failed", "invalid_task")
    assert last["task_id"] == "b.7"


def test_the_workers_other_threads_log_for_the_same_task(services: WorkerServices) -> None:
    renewals: list[dict[str, Any]] = []
    with bound_contextvars(task_id="a"):
        services.lease_renewer.add("run", lambda: renewals.append(get_contextvars()))
        found = services.in_background(get_contextvars).result()
    eventually(lambda: renewals)
    services.lease_renewer.remove("run")
    assert [found["task_id"], renewals[0]["task_id"]] == ["a", "a"]
