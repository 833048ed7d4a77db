from __future__ import annotations

import itertools
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pika
import pytest
import redis

from inferq.broker import Message
from inferq.broker.errors import BrokerUnavailable, PublishRejected, Unroutable
from inferq.producer.gateway.breaker import StoreBreaker
from inferq.producer.gateway.services import Services
from inferq.producer.gateway.settings import GatewaySettings
from inferq.schemas import MAX_BODY_BYTES, Task, parse_task
from tests.conftest import RabbitMQ, Redis
from tests.gateway.conftest import FakePublisher, Gateway, published, running, wait_until

ECHO = {"task_type": "echo", "payload": "hello"}


def problem(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    document: dict[str, Any] = response.json()
    assert document["status"] == status
    assert document["code"] == code
    assert document["type"] == f"urn:inferq:problem:{code}"
    assert document["title"]
    assert document["detail"]
    return document


def test_a_submission_computes_its_digest_once(
    lone_gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[str] = []

    def counted(task: Task, digest: Callable[[Task], str] = Task.digest) -> str:
        computed.append(task.task_id)
        return digest(task)

    monkeypatch.setattr(Task, "digest", counted)
    assert lone_gateway.http.put("/v1/tasks/once", json=ECHO).status_code == 202
    assert computed == ["once"]


def test_a_posted_task_is_on_the_queue_when_it_is_answered(
    gateway: Gateway, shared_rabbitmq: RabbitMQ
) -> None:
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    with pika.BlockingConnection(pika.URLParameters(shared_rabbitmq.node.url_of("gateway"))) as connection:
        channel = connection.channel()
        channel.queue_purge("inference.echo.high")
        body = {**ECHO, "priority": "high", "metadata": {"k": "ü"}}
        response = gateway.http.post("/v1/tasks", json=body, headers={"traceparent": trace})
        assert response.status_code == 202, response.text
        answer = response.json()
        method, properties, raw = channel.basic_get("inference.echo.high", auto_ack=True)
    assert method is not None
    assert properties is not None
    assert properties.headers is not None
    assert raw is not None
    assert properties.message_id == answer["task_id"]
    assert properties.headers["traceparent"] == trace
    task = parse_task(raw)
    assert (task.tenant, task.metadata, task.priority) == (gateway.tenant, {"k": "ü"}, "high")
    assert task.created_at is not None
    assert answer["state"] == "queued"
    assert answer["tenant"] == gateway.tenant
    assert response.headers["location"] == answer["links"]["self"] == f"/v1/tasks/{answer['task_id']}"
    assert gateway.http.get(answer["links"]["self"]).json()["state"] == "queued"


def test_ids_made_by_the_gateway_sort_by_time(gateway: Gateway) -> None:
    ids = [gateway.http.post("/v1/tasks", json=ECHO).json()["task_id"] for _ in range(3)]
    assert ids == sorted(ids)
    assert len(set(ids)) == 3


def test_put_takes_the_id_from_the_path(gateway: Gateway) -> None:
    assert gateway.http.put("/v1/tasks/my:task.1", json=ECHO).json()["task_id"] == "my:task.1"


@pytest.mark.parametrize("task_id", [".", ".."])
def test_ids_that_look_like_folders_work(gateway: Gateway, task_id: str) -> None:
    path = "/v1/tasks/" + "%2E" * len(task_id)
    response = gateway.http.put(path, json=ECHO)
    assert response.status_code == 202, response.text
    assert response.headers["location"] == path
    gateway.end(gateway.task(task_id, payload="hello"))
    assert gateway.http.get(f"{path}/result").json()["task_id"] == task_id


def test_put_refuses_a_body_with_another_id(gateway: Gateway) -> None:
    problem(gateway.http.put("/v1/tasks/a", json={**ECHO, "task_id": "b"}), 422, "id_mismatch")


@pytest.mark.parametrize(
    ("body", "status", "code", "field"),
    [
        (b"", 400, "not_json", None),
        (b"{", 400, "not_json", None),
        (b'{"task_type": "echo", "payload": NaN}', 400, "not_json", None),
        (b'{"task_type": "echo", "payload": 1e999}', 400, "not_json", None),
        (b'{"task_type": "echo", "payload": ' + b"9" * 5000 + b"}", 400, "not_json", None),
        (b"\xff\xfe{}", 400, "not_json", None),
        (b"[]", 400, "not_json", None),
        (b'"echo"', 400, "not_json", None),
        (b"[" * 30000, 400, "not_json", None),
        (b'{"payload": 1}', 422, "invalid_task", "task_type"),
        (b'{"task_type": "nonsense"}', 422, "unknown_task_type", None),
        (b'{"task_type": {"a": 1}}', 422, None, None),
        (b'{"task_type": "echo", "nonsense": 1}', 422, "invalid_task", "nonsense"),
        (b'{"task_type": "echo", "options": {"nonsense": 1}}', 422, "invalid_task", "options.nonsense"),
        (b'{"task_type": "echo", "delay": -1}', 422, "invalid_task", "delay"),
        (b'{"task_type": "echo", "task_id": "a b"}', 422, "invalid_task", "task_id"),
        (b'{"task_type": "echo", "task_id": ""}', 422, "invalid_task", "task_id"),
        (b'{"task_type": "echo", "task_id": null}', 422, "invalid_task", "task_id"),
        (b'{"task_type": "echo", "task_id": "' + b"a" * 129 + b'"}', 422, "invalid_task", "task_id"),
        (b'{"task_type": "echo", "priority": "urgent"}', 422, "invalid_task", "priority"),
        (b'{"task_type": "echo", "created_at": "yesterday"}', 422, "invalid_task", "created_at"),
        (b'{"task_type": "echo", "payload": "\\ud800"}', None, None, None),
    ],
)
def test_a_bad_body_is_refused_and_leaves_nothing(
    lone_gateway: Gateway, body: bytes, status: int | None, code: str | None, field: str | None
) -> None:
    response = lone_gateway.http.post("/v1/tasks", content=body)
    if status is None:
        assert response.status_code in (202, 400, 422)
        return
    assert response.status_code == status, response.text
    document = problem(response, status, code or response.json()["code"])
    if field:
        assert field in [fault["field"] for fault in document["errors"]]
    assert published(lone_gateway) == []
    assert lone_gateway.http.get("/v1/tasks").json()["items"] == []


def test_a_bad_id_in_the_path_is_refused(gateway: Gateway) -> None:
    problem(gateway.http.put("/v1/tasks/a%20b", json=ECHO), 422, "invalid_task")
    problem(gateway.http.get("/v1/tasks/a%20b"), 404, "not_found")


def test_many_faults_give_a_short_answer(gateway: Gateway) -> None:
    response = gateway.http.post("/v1/tasks", json={**ECHO, **{f"f{n}": n for n in range(4000)}})
    assert problem(response, 422, "invalid_task")
    assert len(response.content) < 20_000


def test_a_long_body_is_refused_when_declared(gateway: Gateway) -> None:
    body = json.dumps({**ECHO, "payload": "x" * MAX_BODY_BYTES})
    problem(gateway.http.post("/v1/tasks", content=body), 413, "too_large")


def test_a_long_body_is_refused_when_chunked(gateway: Gateway) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(40):
            yield b" " * 4096

    problem(gateway.http.post("/v1/tasks", content=chunks()), 413, "too_large")


def test_an_endless_body_is_cut_off(gateway: Gateway) -> None:
    sent = itertools.count()

    def chunks() -> Iterator[bytes]:
        while True:
            next(sent)
            yield b" " * (1 << 20)

    with suppress(httpx.TransportError):  # the connection may close before the client reads the answer
        problem(gateway.http.post("/v1/tasks", content=chunks()), 413, "too_large")
    assert next(sent) < 64


def test_a_body_that_only_fits_before_it_is_stamped_is_refused(gateway: Gateway) -> None:
    frame = len(json.dumps({**ECHO, "payload": ""}))
    fits = json.dumps({**ECHO, "payload": "x" * (MAX_BODY_BYTES - frame)})
    assert len(fits) == MAX_BODY_BYTES
    problem(gateway.http.post("/v1/tasks", content=fits), 413, "task_too_large")


def test_text_outside_ascii_counts_by_its_utf8_bytes(gateway: Gateway) -> None:
    body = json.dumps({**ECHO, "payload": "字" * 20_000}, ensure_ascii=False).encode()
    assert gateway.http.post("/v1/tasks", content=body).status_code == 202


def test_a_compressed_body_is_refused(gateway: Gateway) -> None:
    response = gateway.http.post("/v1/tasks", content=b"x", headers={"Content-Encoding": "gzip"})
    problem(response, 415, "unsupported_encoding")


def test_a_silent_client_is_disconnected(tmp_path: Path, redis_url: str, publisher: FakePublisher) -> None:
    with running(tmp_path, redis_url=redis_url, publisher=publisher, body_timeout=0.2) as gateway:
        with socket.create_connection(("127.0.0.1", httpx.URL(gateway.url).port or 0), timeout=10) as line:
            head = f"POST /v1/tasks HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {gateway.key}\r\n"
            line.sendall(f"{head}Content-Length: 10\r\n\r\n{{".encode())
            assert b" 408 " in line.recv(4096)


def test_a_client_that_stops_half_way_leaves_nothing(lone_gateway: Gateway) -> None:
    port = httpx.URL(lone_gateway.url).port or 0
    with socket.create_connection(("127.0.0.1", port), timeout=10) as line:
        head = f"PUT /v1/tasks/half HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {lone_gateway.key}\r\n"
        line.sendall(f"{head}Content-Length: 100\r\n\r\n".encode() + json.dumps(ECHO).encode())
    problem(lone_gateway.http.get("/v1/tasks/half"), 404, "not_found")
    assert lone_gateway.http.put("/v1/tasks/half", json=ECHO).status_code == 202
    assert published(lone_gateway) == ["half"]


def test_a_client_that_leaves_before_the_answer_has_its_task_submitted(
    lone_gateway: Gateway, publisher: FakePublisher
) -> None:
    publisher.delay = 0.3
    body = json.dumps(ECHO).encode()
    port = httpx.URL(lone_gateway.url).port or 0
    with socket.create_connection(("127.0.0.1", port), timeout=10) as line:
        head = f"PUT /v1/tasks/left HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {lone_gateway.key}\r\n"
        line.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_until(lambda: lone_gateway.status.get(lone_gateway.tenant, "left"))
    wait_until(lambda: publisher.ids() == ["left"])
    wait_until(lambda: lone_gateway.status.submit(lone_gateway.task("left", payload="hello")).confirmed)


@pytest.mark.parametrize("header", [None, "", "Bearer", "Basic abc", "Bearer iq_nonsense", "Bearer é"])
def test_without_a_known_key_every_route_answers_401(gateway: Gateway, header: str | None) -> None:
    headers = {"Authorization": header.encode("latin-1")} if header is not None else {}
    with gateway.client(None) as stranger:
        for method, path in [
            ("POST", "/v1/tasks"),
            ("PUT", "/v1/tasks/a"),
            ("GET", "/v1/tasks"),
            ("GET", "/v1/tasks/a"),
            ("GET", "/v1/tasks/a/result"),
            ("GET", "/v1/tasks/a/events"),
            ("GET", "/v1/tasks/a/artifacts/b"),
            ("POST", "/v1/tasks/a/cancel"),
            ("POST", "/v1/files"),
        ]:
            response = stranger.request(method, path, headers=headers)  # type: ignore[arg-type]
            assert response.status_code == 401, (method, path)
            assert response.headers["www-authenticate"].startswith("Bearer")
            assert response.json()["code"] in ("no_api_key", "unknown_api_key")


def test_a_removed_key_is_refused_at_once(gateway: Gateway) -> None:
    assert gateway.http.get("/v1/tasks").status_code == 200
    record = next(record for record in gateway.keys.list() if record.tenant == gateway.tenant)
    gateway.keys.remove(record.key_id)
    problem(gateway.http.get("/v1/tasks"), 401, "unknown_api_key")


def test_the_scheme_is_not_case_sensitive(gateway: Gateway) -> None:
    headers = {"Authorization": f"bearer  {gateway.key}"}
    with gateway.client(None) as client:
        assert client.get("/v1/tasks", headers=headers).status_code == 200


def test_a_body_that_names_another_tenant_is_refused(gateway: Gateway) -> None:
    problem(gateway.http.post("/v1/tasks", json={**ECHO, "tenant": "default"}), 403, "tenant_mismatch")
    assert gateway.http.post("/v1/tasks", json={**ECHO, "tenant": gateway.tenant}).status_code == 202


def test_tenants_may_use_the_same_id_for_different_tasks(gateway: Gateway) -> None:
    with gateway.someone() as other:
        assert gateway.http.put("/v1/tasks/same", json=ECHO).status_code == 202
        assert other.put("/v1/tasks/same", json={**ECHO, "payload": 2}).status_code == 202


def test_submitting_again_publishes_nothing(lone_gateway: Gateway) -> None:
    first = lone_gateway.http.put("/v1/tasks/a", json=ECHO)
    again = lone_gateway.http.put("/v1/tasks/a", json={**ECHO, "priority": "normal", "options": {}})
    assert (first.status_code, again.status_code) == (202, 202)
    assert first.json() == again.json()
    assert published(lone_gateway) == ["a"]


def test_submitting_an_ended_task_again_answers_with_its_end(lone_gateway: Gateway) -> None:
    lone_gateway.http.put("/v1/tasks/a", json=ECHO)
    lone_gateway.end(lone_gateway.task("a", payload="hello"))
    again = lone_gateway.http.put("/v1/tasks/a", json=ECHO)
    assert (again.status_code, again.json()["state"]) == (200, "succeeded")
    assert published(lone_gateway) == ["a"]


def test_the_same_id_with_another_content_is_refused(lone_gateway: Gateway) -> None:
    lone_gateway.http.put("/v1/tasks/a", json=ECHO)
    document = problem(lone_gateway.http.put("/v1/tasks/a", json={**ECHO, "payload": 2}), 409, "id_conflict")
    assert document["task_id"] == "a"
    problem(
        lone_gateway.http.post("/v1/tasks", json={**ECHO, "task_id": "a", "delay": 1}), 409, "id_conflict"
    )
    assert published(lone_gateway) == ["a"]


@pytest.mark.parametrize("state", ["succeeded", "failed", "cancelled"])
def test_an_id_that_redis_has_forgotten_is_known_by_its_result(lone_gateway: Gateway, state: Any) -> None:
    lone_gateway.end(lone_gateway.task("old", payload="hello"), state, redis=False)
    again = lone_gateway.http.put("/v1/tasks/old", json=ECHO)
    assert (again.status_code, again.json()["state"]) == (200, state)
    problem(lone_gateway.http.put("/v1/tasks/old", json={**ECHO, "payload": 2}), 409, "id_conflict")
    assert published(lone_gateway) == []
    assert lone_gateway.status.get(lone_gateway.tenant, "old") is None


@pytest.mark.parametrize("delay", [0.0, 0.05])
def test_fifty_submissions_of_one_id_at_once_are_one_task(
    lone_gateway: Gateway, publisher: FakePublisher, delay: float
) -> None:
    publisher.delay = delay
    with ThreadPoolExecutor(50) as threads:
        answers = list(threads.map(lambda _: lone_gateway.http.put("/v1/tasks/one", json=ECHO), range(50)))
    assert {answer.status_code for answer in answers} == {202}
    assert {answer.json()["task_id"] for answer in answers} == {"one"}
    assert publisher.ids() == ["one"]
    assert len(lone_gateway.http.get("/v1/tasks").json()["items"]) == 1


def test_of_two_contents_under_one_id_at_once_one_is_accepted(
    lone_gateway: Gateway, publisher: FakePublisher
) -> None:
    publisher.delay = 0.05
    bodies = [{**ECHO, "payload": n % 2} for n in range(20)]
    with ThreadPoolExecutor(20) as threads:
        answers = list(threads.map(lambda body: lone_gateway.http.put("/v1/tasks/two", json=body), bodies))
    assert sorted(answer.status_code for answer in answers) == [202] * 10 + [409] * 10
    assert publisher.ids() == ["two"]


def test_fifty_submissions_through_the_real_broker(gateway: Gateway) -> None:
    with ThreadPoolExecutor(50) as threads:
        answers = list(threads.map(lambda _: gateway.http.put("/v1/tasks/real", json=ECHO), range(50)))
    assert {answer.status_code for answer in answers} == {202}
    assert len(gateway.http.get("/v1/tasks").json()["items"]) == 1


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (BrokerUnavailable("away"), "broker_unavailable"),
        (PublishRejected("full"), "publish_rejected"),
        (Unroutable("nowhere"), "unroutable"),
    ],
)
def test_a_task_that_the_broker_did_not_confirm_leaves_nothing(
    lone_gateway: Gateway, publisher: FakePublisher, error: Any, code: str
) -> None:
    publisher.error = error
    response = lone_gateway.http.put("/v1/tasks/later", json=ECHO)
    document = problem(response, 503, code)
    assert document["task_id"] == "later"
    assert int(response.headers["retry-after"]) >= 1
    assert lone_gateway.status.get(lone_gateway.tenant, "later") is None
    problem(lone_gateway.http.get("/v1/tasks/later"), 404, "not_found")
    publisher.error = None
    # No record is left, so other content is accepted under the same id.
    assert lone_gateway.http.put("/v1/tasks/later", json={**ECHO, "payload": 2}).status_code == 202
    assert publisher.ids() == ["later"]


def test_a_broker_that_is_down_gives_503_within_the_limit(tmp_path: Path, redis_url: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    url = f"amqp://guest:guest@127.0.0.1:{port}/"
    with running(tmp_path, redis_url=redis_url, amqp_url=url, submit_timeout=0.3) as gateway:
        begun = time.monotonic()
        response = gateway.http.put("/v1/tasks/a", json=ECHO)
        assert time.monotonic() - begun < 30
        problem(response, 503, "broker_unavailable")
        assert "retry-after" in response.headers
        assert gateway.status.get(gateway.tenant, "a") is None
        ready = gateway.http.get("/readyz")
        assert (ready.status_code, ready.json()["status"]) == (503, "unavailable")
        assert ready.json()["checks"]["broker"] == {"ok": False, "detail": "not connected"}
        assert gateway.http.get("/healthz").status_code == 200


def test_an_unexpected_error_leaves_and_reveals_nothing(
    lone_gateway: Gateway, publisher: FakePublisher
) -> None:
    publisher.error = RuntimeError("secret internals")  # type: ignore[assignment]
    response = lone_gateway.http.put("/v1/tasks/odd", json=ECHO)
    problem(response, 500, "internal")
    assert "secret" not in response.text
    assert lone_gateway.status.get(lone_gateway.tenant, "odd") is None


def refuse_writes(node: Redis) -> None:
    with redis.Redis.from_url(node.url) as client:
        client.config_set("maxmemory", "1")


@pytest.mark.parametrize("break_", [Redis.kill, refuse_writes])
def test_without_redis_a_task_is_published_nevertheless(
    tmp_path: Path, redis_node: Redis, publisher: FakePublisher, break_: Callable[[Redis], None]
) -> None:
    with running(tmp_path, redis_url=redis_node.url, publisher=publisher) as gateway:
        break_(redis_node)
        response = gateway.http.put("/v1/tasks/a", json=ECHO)
        assert (response.status_code, response.json()["state"]) == (202, "queued")
        assert publisher.ids() == ["a"]
        again = gateway.http.put("/v1/tasks/a", json=ECHO)
        assert (again.status_code, again.json()["state"]) == (202, "queued")
        problem(gateway.http.put("/v1/tasks/a", json={**ECHO, "payload": 2}), 409, "id_conflict")
        assert publisher.ids() == ["a"]
        # Without Redis the gateway cannot say that a task does not exist: 503, not 404.
        problem(gateway.http.get("/v1/tasks/a"), 503, "status_unavailable")
        problem(gateway.http.get("/v1/tasks/a/events"), 503, "status_unavailable")
        problem(gateway.http.post("/v1/tasks/a/cancel"), 503, "status_unavailable")
        problem(gateway.http.get("/v1/tasks"), 503, "status_unavailable")
        problem(gateway.http.get("/v1/tasks/a/result"), 503, "status_unavailable")
        ready = gateway.http.get("/readyz")
        assert (ready.status_code, ready.json()["status"]) == (200, "degraded")
        assert not ready.json()["checks"]["redis"]["ok"]
        # The end of a task is in the object store.
        gateway.end(gateway.task("a", payload="hello"), redis=False)
        assert gateway.http.get("/v1/tasks/a").json()["state"] == "succeeded"
        assert gateway.http.get("/v1/tasks/a/result").json()["output"] == {"payload": 1}
        assert "task.succeeded" in gateway.http.get("/v1/tasks/a/events").text
        problem(gateway.http.post("/v1/tasks/a/cancel"), 409, "already_ended")
        again = gateway.http.put("/v1/tasks/a", json=ECHO)
        assert (again.status_code, again.json()["state"]) == (200, "succeeded")
        problem(gateway.http.put("/v1/tasks/a", json={**ECHO, "payload": 2}), 409, "id_conflict")
        assert publisher.ids() == ["a"]


def test_a_task_is_recorded_once_redis_is_back(
    tmp_path: Path, redis_node: Redis, publisher: FakePublisher
) -> None:
    with running(tmp_path, redis_url=redis_node.url, publisher=publisher) as gateway:
        redis_node.kill()
        for task_id in ("a", "b"):
            assert gateway.http.put(f"/v1/tasks/{task_id}", json=ECHO).status_code == 202
        redis_node.start()
        for task_id in ("a", "b"):
            wait_until(lambda: gateway.http.get(f"/v1/tasks/{task_id}").status_code == 200)  # noqa: B023
            assert gateway.http.get(f"/v1/tasks/{task_id}").json()["state"] == "queued"
        assert gateway.http.post("/v1/tasks/a/cancel").status_code == 202


def test_a_task_that_redis_missed_is_known_as_soon_as_redis_is_back(
    tmp_path: Path, redis_node: Redis, publisher: FakePublisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inferq.producer.gateway.submission._RETRY_SECONDS", 3600.0)
    with running(tmp_path, redis_url=redis_node.url, publisher=publisher) as gateway:
        redis_node.kill()
        for task_id in ("a", "b", "c"):
            assert gateway.http.put(f"/v1/tasks/{task_id}", json=ECHO).status_code == 202
        redis_node.start()
        wait_until(lambda: gateway.http.get("/v1/tasks/a").status_code != 503)
        problem(gateway.http.put("/v1/tasks/c", json={**ECHO, "payload": 2}), 409, "id_conflict")
        assert publisher.ids() == ["a", "b", "c"]
        assert gateway.http.get("/v1/tasks/a").json()["state"] == "queued"
        assert gateway.http.post("/v1/tasks/b/cancel").status_code == 202
        assert gateway.http.get("/v1/tasks/b").json()["cancel_requested"]


def test_a_store_that_hangs_delays_one_submission_only(
    tmp_path: Path, redis_url: str, publisher: FakePublisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()
    asked: list[str] = []

    def hang(_tenant: str, task_id: str) -> None:
        asked.append(task_id)
        released.wait(20)

    breaker = StoreBreaker(limit=0.2, pause=3600)
    with running(tmp_path, redis_url=redis_url, publisher=publisher, store_breaker=breaker) as gateway:
        services: Services = gateway.server.config.app.state.services  # type: ignore[union-attr]
        monkeypatch.setattr(services.results, "load", hang)
        for number in range(20):
            assert gateway.http.put(f"/v1/tasks/hung{number}", json=ECHO).status_code == 202
        released.set()
    assert asked == ["hung0"]


def test_an_id_that_another_running_task_took_meanwhile_is_a_conflict(
    lone_gateway: Gateway, publisher: FakePublisher
) -> None:
    """The other task was published by AMQP, so it has no record until a worker begins it."""
    publish = publisher.confirm

    async def begun_meanwhile(message: Message, *, timeout: float | None = None) -> None:
        await publish(message, timeout=timeout)
        lone_gateway.began("won", payload="another")

    publisher.confirm = begun_meanwhile  # type: ignore[method-assign]
    problem(lone_gateway.http.put("/v1/tasks/won", json=ECHO), 409, "id_conflict")
    assert lone_gateway.http.get("/v1/tasks/won").json()["state"] == "running"


def test_an_input_that_was_never_uploaded_is_refused_early(lone_gateway: Gateway) -> None:
    for url in ("inferq:nothing.png", "inferq:../../keys.json", "inferq://x"):
        response = lone_gateway.http.put("/v1/tasks/ocr1", json={"task_type": "ocr", "image_url": url})
        assert response.status_code == 422, response.text
        assert response.json()["code"] in ("unknown_file", "bad_input_url")
    assert published(lone_gateway) == []
    assert lone_gateway.status.get(lone_gateway.tenant, "ocr1") is None


def test_another_tenants_upload_is_no_input(lone_gateway: Gateway) -> None:
    with lone_gateway.someone() as other:
        url = other.post("/v1/files", content=b"theirs").json()["url"]
        task = {"task_type": "ocr", "image_url": url}
        problem(lone_gateway.http.post("/v1/tasks", json=task), 422, "unknown_file")
        assert other.post("/v1/tasks", json=task).status_code == 202


def test_prefer_wait_answers_with_the_result(lone_gateway: Gateway, publisher: FakePublisher) -> None:
    def work() -> None:
        wait_until(lambda: publisher.messages)
        lone_gateway.end(lone_gateway.task("w", payload="hello"))

    worker = threading.Thread(target=work)
    worker.start()
    # Longer than the client's own time limit: an answer shows that the end is not merely found afterwards.
    response = lone_gateway.http.put("/v1/tasks/w", json=ECHO, headers={"Prefer": "respond-async, wait=60"})
    worker.join()
    assert response.status_code == 200
    assert response.headers["preference-applied"] == "wait=60"
    assert response.json()["state"] == "succeeded"
    assert response.json()["result"]["output"] == {"payload": 1}


def test_prefer_wait_answers_202_when_the_time_is_over(lone_gateway: Gateway) -> None:
    begun = time.monotonic()
    response = lone_gateway.http.post("/v1/tasks", json=ECHO, headers={"Prefer": "wait=1"})
    assert time.monotonic() - begun > 0.9
    assert (response.status_code, response.json()["state"]) == (202, "queued")
    assert "result" not in response.json()


def test_a_stopping_gateway_answers_waiting_requests(
    tmp_path: Path, redis_url: str, publisher: FakePublisher
) -> None:
    with running(tmp_path, redis_url=redis_url, publisher=publisher) as gateway:
        with ThreadPoolExecutor(2) as threads:
            waiting = threads.submit(
                gateway.http.put, "/v1/tasks/w", json=ECHO, headers={"Prefer": "wait=60"}
            )
            wait_until(lambda: publisher.messages)
            gateway.server.should_exit = True
            # Past the grace period the connection would be closed without an answer.
            assert waiting.result(20).status_code == 202


def test_settings_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="max_upload_bytes"):
        GatewaySettings(max_upload_bytes=0)
