from __future__ import annotations

import hashlib
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest

from inferq.schemas import Artifact, Batch, ErrorInfo, Task
from inferq.storage import BatchStore
from inferq.storage.status.keys import record_key
from tests.gateway.conftest import Gateway, wait_until
from tests.gateway.test_gateway_submit import ECHO, problem
from tests.runs import begin_run

PATHS = ["", "/result", "/events", "/artifacts/a.txt"]


def with_artifact(
    gateway: Gateway,
    tmp_path: Path,
    name: str = "a.txt",
    content_type: str = "text/plain",
    data: bytes = b"abc",
) -> Task:
    task = gateway.task("task-with-artifact", payload="hello")
    file = tmp_path / "artifact"
    file.write_bytes(data)
    artifact = gateway.results.save_artifact(task.tenant, task.task_id, name, file, content_type, run="t1")
    gateway.end(task, artifacts=(artifact,))
    return task


def test_another_tenants_task_is_as_if_it_did_not_exist(gateway: Gateway, tmp_path: Path) -> None:
    task = with_artifact(gateway, tmp_path)
    with gateway.someone() as other:
        for path in PATHS:
            theirs = other.get(f"/v1/tasks/{task.task_id}{path}")
            nobodys = other.get(f"/v1/tasks/there-is-none{path}")
            problem(theirs, 404, "not_found")
            text = theirs.text.replace(task.task_id, "there-is-none")
            assert text == nobodys.text
            assert gateway.http.get(f"/v1/tasks/{task.task_id}{path}").status_code == 200
        problem(other.post(f"/v1/tasks/{task.task_id}/cancel"), 404, "not_found")
        assert other.get("/v1/tasks").json()["items"] == []


def test_the_status_follows_the_task(gateway: Gateway) -> None:
    gateway.http.put("/v1/tasks/s", json=ECHO)
    task = gateway.began("s", payload="hello")
    gateway.status.progress(gateway.tenant, "s", 0.25, "waiting")
    answer = gateway.http.get("/v1/tasks/s").json()
    assert (answer["state"], answer["progress"], answer["progress_note"]) == ("running", 0.25, "waiting")
    assert answer["worker"] == "w1"
    gateway.end(task, "failed")
    answer = gateway.http.get("/v1/tasks/s").json()
    assert answer["state"] == "failed"
    assert answer["error"]["message"] == "it broke"


def test_waiting_for_the_status_ends_with_the_task(gateway: Gateway) -> None:
    task = gateway.began("s")
    threading.Timer(0.2, lambda: gateway.end(task)).start()
    # Longer than the client's own time limit: an answer shows that the end is not merely found afterwards.
    response = gateway.http.get("/v1/tasks/s", headers={"Prefer": "wait=60"})
    assert response.json()["state"] == "succeeded"
    assert response.headers["preference-applied"] == "wait=60"


def test_an_end_that_redis_missed_is_found_in_the_store(gateway: Gateway) -> None:
    long_ago = datetime.now(UTC) - timedelta(minutes=10)
    task = gateway.task("missed")
    begin_run(gateway.status, task, started_at=long_ago)
    assert gateway.http.get("/v1/tasks/missed").json()["state"] == "running"
    gateway.end(task, redis=False)
    assert gateway.http.get("/v1/tasks/missed").json()["state"] == "succeeded"
    # The status repaired Redis, so lists agree.
    (listed,) = gateway.http.get("/v1/tasks").json()["items"]
    assert listed["state"] == "succeeded"


def test_a_redriven_task_is_not_called_failed_again(gateway: Gateway) -> None:
    task = gateway.began("redriven")
    gateway.end(task, "failed")
    long_ago = datetime.now(UTC) - timedelta(minutes=10)
    begin_run(gateway.status, task, redrives=1, worker="w2", started_at=long_ago)
    assert gateway.http.get("/v1/tasks/redriven").json()["state"] == "running"
    with gateway.http.stream("GET", "/v1/tasks/redriven/events") as response:
        chunks = response.iter_raw()
        text = next(chunks)
        assert b"task.started" in text
        # Past a heartbeat, which polls the object store and finds the earlier failure.
        while b": ping" not in text:
            text += next(chunks)
        gateway.end(task, "succeeded", redrives=1)
        text += b"".join(chunks)
        assert b"task.failed" not in text
        assert b"task.succeeded" in text


def test_a_result_tells_everything(gateway: Gateway, tmp_path: Path) -> None:
    task = with_artifact(gateway, tmp_path)
    result = gateway.http.get(f"/v1/tasks/{task.task_id}/result").json()
    assert (result["status"], result["output"]) == ("succeeded", {"payload": 1})
    (artifact,) = result["artifacts"]
    assert artifact["url"] == f"{gateway.url}/v1/tasks/{task.task_id}/artifacts/a.txt"
    assert gateway.http.get(artifact["url"]).content == b"abc"


def test_a_failure_is_a_result_too(gateway: Gateway) -> None:
    gateway.end(gateway.began("f"), "failed")
    response = gateway.http.get("/v1/tasks/f/result")
    assert response.status_code == 200
    assert response.json()["error"]["code"] == "broken"


def test_there_is_no_result_before_the_end(gateway: Gateway) -> None:
    gateway.began("r")
    document = problem(gateway.http.get("/v1/tasks/r/result"), 409, "not_ended")
    assert (document["state"], document["task_id"]) == ("running", "r")
    problem(gateway.http.get("/v1/tasks/r/artifacts/a"), 404, "not_found")


def test_waiting_for_a_result(gateway: Gateway) -> None:
    task = gateway.began("r")
    threading.Timer(0.2, lambda: gateway.end(task)).start()
    response = gateway.http.get("/v1/tasks/r/result", headers={"Prefer": "wait=20"})
    assert response.json()["output"] == {"payload": 1}
    gateway.began("r2")
    problem(gateway.http.get("/v1/tasks/r2/result", headers={"Prefer": "wait=1"}), 409, "not_ended")


def test_an_artifact_is_served_whole_and_safely(gateway: Gateway, tmp_path: Path) -> None:
    data = bytes(range(256)) * 20_000
    name = 'naïve "name" <1>.bin'
    task = with_artifact(gateway, tmp_path, name, "application/zip", data)
    (artifact,) = gateway.http.get(f"/v1/tasks/{task.task_id}/result").json()["artifacts"]
    response = gateway.http.get(artifact["url"])
    assert response.content == data
    assert response.headers["content-length"] == str(len(data))
    assert response.headers["content-type"] == "application/zip"
    assert response.headers["etag"] == f'"{hashlib.sha256(data).hexdigest()}"'
    assert response.headers["x-content-type-options"] == "nosniff"
    assert "sandbox" in response.headers["content-security-policy"]
    disposition = response.headers["content-disposition"]
    assert disposition.startswith("attachment; filename*=UTF-8''na%C3%AFve%20%22name%22%20")
    again = gateway.http.get(artifact["url"], headers={"If-None-Match": response.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize(
    ("content_type", "shown"),
    [
        ("image/png", "inline"),
        ("audio/x-wav", "inline"),
        ("text/plain; charset=utf-8", "inline"),
        ("text/html", "attachment"),
        ("image/svg+xml", "attachment"),
        ("application/xhtml+xml", "attachment"),
        ("text/html\r\nX-Evil: 1", "attachment"),
        ("", "attachment"),
    ],
)
def test_only_harmless_types_are_shown_in_place(
    gateway: Gateway, tmp_path: Path, content_type: str, shown: str
) -> None:
    task = with_artifact(gateway, tmp_path, content_type=content_type)
    response = gateway.http.get(f"/v1/tasks/{task.task_id}/artifacts/a.txt")
    assert response.status_code == 200
    assert response.headers["content-disposition"].startswith(shown)
    assert "x-evil" not in response.headers


@pytest.mark.parametrize(
    "name",
    [
        "..%2fresult.json", "%2e%2e", "%2e%2e%2f%2e%2e%2fx", "..%5cresult.json", "a.txt%00", "a.txt/",
        "%2fetc%2fpasswd", "t1%2fa.txt", "result.json", "a.TXT", "%C3", "a" * 3000,
    ],
)  # fmt: skip
def test_path_tricks_find_nothing(gateway: Gateway, tmp_path: Path, name: str) -> None:
    task = with_artifact(gateway, tmp_path)
    problem(gateway.http.get(f"/v1/tasks/{task.task_id}/artifacts/{name}"), 404, "not_found")


def test_an_artifact_that_is_gone_is_not_found(gateway: Gateway, tmp_path: Path) -> None:
    task = with_artifact(gateway, tmp_path)
    gateway.store.delete(gateway.results.artifact_key(task.tenant, task.task_id, "a.txt"))
    problem(gateway.http.get(f"/v1/tasks/{task.task_id}/artifacts/a.txt"), 404, "not_found")


def test_an_unreadable_result_is_an_internal_problem_without_details(gateway: Gateway) -> None:
    place = f"tasks/{gateway.tenant}/mad/result.json"
    gateway.store.put(place, b"{}", content_type="application/json")
    response = gateway.http.get("/v1/tasks/mad/result")
    problem(response, 500, "internal")
    assert "tasks/" not in response.text


def test_cancelling_sets_the_flag(gateway: Gateway) -> None:
    gateway.http.put("/v1/tasks/c", json=ECHO)
    response = gateway.http.post("/v1/tasks/c/cancel")
    assert response.status_code == 202
    assert response.json()["cancel_requested"] is True
    assert gateway.status.cancel_requested(gateway.tenant, "c")
    assert gateway.http.post("/v1/tasks/c/cancel").status_code == 202


def test_cancelling_what_has_ended(gateway: Gateway) -> None:
    gateway.end(gateway.began("done"))
    document = problem(gateway.http.post("/v1/tasks/done/cancel"), 409, "already_ended")
    assert document["state"] == "succeeded"
    gateway.end(gateway.began("gone"), "cancelled")
    assert gateway.http.post("/v1/tasks/gone/cancel").status_code == 200
    problem(gateway.http.post("/v1/tasks/none/cancel"), 404, "not_found")


def test_lists_come_in_pages_newest_first(gateway: Gateway) -> None:
    ids = [
        gateway.http.post("/v1/tasks", json={**ECHO, "batch_id": f"b{n % 2}"}).json()["task_id"]
        for n in range(7)
    ]
    gateway.end(gateway.task(ids[0], payload="hello", batch_id="b0"))
    seen: list[str] = []
    path: str | None = "/v1/tasks?limit=3"
    pages = 0
    while path:
        response = gateway.http.get(path)
        page = response.json()
        seen += [item["task_id"] for item in page["items"]]
        path, pages = page["next"], pages + 1
        assert (path is None) == ("link" not in response.headers)
        if path:
            assert parse_qs(urlsplit(path).query)["limit"] == ["3"]
    assert seen == ids[::-1]
    assert pages <= 4

    def listed(**filters: Any) -> list[str]:
        response = gateway.http.get("/v1/tasks", params=filters)
        return [item["task_id"] for item in response.json()["items"]]

    assert listed(status="succeeded") == [ids[0]]
    assert listed(batch_id="b1") == [ids[5], ids[3], ids[1]]
    assert listed(batch_id="b0", status="queued", limit=1) == [ids[6]]
    assert listed(task_type="ocr") == []
    assert listed(task_type="echo", limit=200) == ids[::-1]


@pytest.mark.parametrize(
    "query",
    ["limit=0", "limit=201", "limit=x", "status=no", "cursor=no", "cursor=%00", "task_type=A", "batch_id="],
)  # fmt: skip
def test_a_bad_list_is_refused(gateway: Gateway, query: str) -> None:
    response = gateway.http.get(f"/v1/tasks?{query}")
    assert response.status_code == 422, response.text
    field = query.partition("=")[0]
    document = response.json()
    assert document["code"] in ("invalid_request", "bad_cursor")
    if document["code"] == "invalid_request":
        assert [fault["field"] for fault in document["errors"]] == [field]


def test_artifact_urls_survive_odd_names(gateway: Gateway) -> None:
    artifact = Artifact(
        name="a b/ü?.txt", url="file:///x/t1/y", content_type="text/plain", bytes=1, sha256="0"
    )
    gateway.end(gateway.began("odd"), artifacts=(artifact,))
    (told,) = gateway.http.get("/v1/tasks/odd/result").json()["artifacts"]
    assert told["url"].endswith("/artifacts/a%20b%2F%C3%BC%3F.txt")
    assert httpx.URL(told["url"]).host == "127.0.0.1"


def test_ended_tasks_are_answered_when_redis_has_forgotten(gateway: Gateway) -> None:
    task = gateway.task("old", payload=1)
    gateway.end(task, redis=False)
    assert gateway.http.get("/v1/tasks/old").json()["state"] == "succeeded"
    assert gateway.http.get("/v1/tasks/old/result").json()["output"] == {"payload": 1}
    assert "task.succeeded" in gateway.http.get("/v1/tasks/old/events").text
    problem(gateway.http.post("/v1/tasks/old/cancel"), 409, "already_ended")


def test_an_unavailable_store_is_reported(own_gateway: Gateway, tmp_path: Path) -> None:
    task = own_gateway.began("a")
    own_gateway.end(task)
    store = tmp_path / "store"
    store.rename(tmp_path / "away")
    store.write_text("not a folder")
    try:
        assert own_gateway.http.get("/v1/tasks/a").json()["state"] == "succeeded"
        ready = wait_until(lambda: (r := own_gateway.http.get("/readyz")).status_code == 503 and r)
        assert not ready.json()["checks"]["store"]["ok"]
        response = own_gateway.http.post("/v1/files", content=b"x")
        problem(response, 503, "store_unavailable")
        assert response.headers["retry-after"] == "5"
        # Tasks are still accepted: the worker checks again before it runs anything.
        assert own_gateway.http.put("/v1/tasks/mine", json=ECHO).status_code == 202
    finally:
        store.unlink()
        (tmp_path / "away").rename(store)


def test_batches_are_listed_newest_first_whatever_their_ids(gateway: Gateway) -> None:
    store = BatchStore(gateway.store)
    names = ["nightly-2026", "0198", "z", "a", "nightly-2025"]
    for name in names:
        store.create(
            Batch(batch_id=name, tenant=gateway.tenant, source="inferq:x", created_at=datetime.now(UTC))
        )
    found, path = [], "/v1/batches?limit=2"
    while path:
        page = gateway.http.get(path).json()
        found += [item["batch_id"] for item in page["items"]]
        path = page["next"]
    assert found == names[::-1]
    assert gateway.http.get("/v1/batches?cursor=z").json()["code"] == "bad_cursor"


def test_a_batch_submitted_again_after_its_deletion_is_listed_once(gateway: Gateway) -> None:
    store = BatchStore(gateway.store)
    made = [
        Batch(batch_id=name, tenant=gateway.tenant, source="inferq:x", created_at=datetime.now(UTC))
        for name in ("again", "gone", "other")
    ]
    for batch in made:
        store.create(batch)
    for name in ("again", "gone"):
        gateway.store.delete(f"batches/{gateway.tenant}/{name}/batch.json")
    store.create(made[0].model_copy(update={"created_at": datetime.now(UTC)}))
    page = gateway.http.get("/v1/batches").json()
    assert [item["batch_id"] for item in page["items"]] == ["again", "other"]


@pytest.mark.parametrize("state", ["queued", "retrying"])
def test_a_cancelled_task_whose_message_is_lost_ends(lone_gateway: Gateway, state: str) -> None:
    created = (datetime.now(UTC) - timedelta(minutes=2)).isoformat()
    body = {**ECHO, "created_at": created, "metadata": {"order": 7}}
    assert lone_gateway.http.put("/v1/tasks/gone", json=body).status_code == 202
    task = lone_gateway.task("gone", payload="hello", metadata=body["metadata"])
    if state == "retrying":
        error = ErrorInfo(code="boom", message="it broke", retryable=True)
        lone_gateway.status.retrying(task, attempt=1, redrives=0, error=error)
    assert lone_gateway.http.post("/v1/tasks/gone/cancel").status_code == 202
    assert lone_gateway.http.get("/v1/tasks/gone").json()["state"] == state  # a worker may still take it
    key = record_key(lone_gateway.tenant, "gone")
    lone_gateway.status.write(lambda client: client.hset(key, "x", "1"))
    counted = _cancelled(lone_gateway)
    assert lone_gateway.http.get("/v1/tasks/gone").json()["state"] == "cancelled"
    result = lone_gateway.http.get("/v1/tasks/gone/result").json()
    assert (result["status"], result["error"]["code"]) == ("cancelled", "cancelled")
    assert (result["digest"], result["attempts"]) == (task.digest(), int(state == "retrying"))
    assert _cancelled(lone_gateway) == counted + 1


def _cancelled(gateway: Gateway) -> float:
    """How many cancelled tasks the gateway ended itself, by its metrics."""
    name = 'inferq_tasks_ended_total{error_code="cancelled",status="cancelled",task_type="echo"} '
    lines = gateway.get_openly("/metrics").text.splitlines()
    return sum(float(line.removeprefix(name)) for line in lines if line.startswith(name))


def test_a_creation_time_in_the_future_does_not_hide_an_end_that_redis_missed(lone_gateway: Gateway) -> None:
    body = {**ECHO, "created_at": "2100-01-01T00:00:00Z"}
    assert lone_gateway.http.put("/v1/tasks/early", json=body).status_code == 202
    lone_gateway.end(lone_gateway.task("early", payload="hello"), redis=False)
    assert lone_gateway.http.get("/v1/tasks/early").json()["state"] == "succeeded"
