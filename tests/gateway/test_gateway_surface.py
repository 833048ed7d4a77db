from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from prometheus_client.parser import text_string_to_metric_families

from inferq.producer.gateway.app import create_app
from inferq.producer.gateway.body import decode_json
from inferq.producer.gateway.prefer import wait_seconds
from inferq.producer.gateway.server import listen, url_of
from inferq.producer.gateway.settings import GatewaySettings
from inferq.schemas import InstallationError, InvalidTask
from inferq.storage.settings import StorageSettings
from tests.gateway.conftest import FakePublisher, Gateway, running, wait_until
from tests.gateway.test_gateway_submit import ECHO, problem
from tests.logged import logged


@pytest.mark.parametrize(
    "path", ["/", "/nothing", "/v1", "/v1/nothing", "/v1/tasks/", "/v1/tasks/a/b/c", "/docs", "//v1/tasks"]
)
def test_an_unknown_path_is_a_problem_document(gateway: Gateway, path: str) -> None:
    problem(gateway.http.get(path), 404, "not_found")


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/v1/tasks", "GET, HEAD, POST"),
        ("/v1/tasks/a", "GET, HEAD, PUT"),
        ("/v1/tasks/a/events", "GET"),
        ("/v1/batches", "GET, HEAD, POST"),
        ("/v1/files", "POST"),
    ],
)
def test_an_unsupported_method_is_told_all_that_the_path_supports(
    gateway: Gateway, path: str, allowed: str
) -> None:
    response = gateway.http.delete(path)
    problem(response, 405, "method_not_allowed")
    assert response.headers["allow"] == allowed


def test_every_answer_carries_the_security_headers(gateway: Gateway) -> None:
    for path in ("/v1/tasks", "/nothing", "/healthz"):
        headers = gateway.http.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
        assert "server" not in headers
        assert "access-control-allow-origin" not in headers


def test_the_health_pages_are_open(gateway: Gateway) -> None:
    assert gateway.get_openly("/healthz").json() == {"status": "ok"}
    ready = gateway.get_openly("/readyz")
    assert ready.status_code == 200
    assert ready.json()["status"] == "ready"
    assert set(ready.json()["checks"]) == {"broker", "store", "redis"}


def test_a_blocking_broker_is_reported(lone_gateway: Gateway, publisher: FakePublisher) -> None:
    publisher.blocked_reason = "low on memory"
    ready = wait_until(lambda: (r := lone_gateway.http.get("/readyz")).json()["status"] == "degraded" and r)
    assert ready.status_code == 200
    assert "low on memory" in ready.json()["checks"]["broker"]["detail"]


def test_metrics_have_the_route_template_and_never_the_path_or_unknown_methods(own_gateway: Gateway) -> None:
    own_gateway.http.put("/v1/tasks/a", json=ECHO)
    own_gateway.http.get("/v1/tasks/secret-id")
    own_gateway.http.get("/made/up/path")
    own_gateway.http.request("NONSENSE", "/v1/tasks")
    own_gateway.http.post("/v1/tasks", json=ECHO | {"task_type": "made_up_type"})
    text = own_gateway.get_openly("/metrics").text
    assert "secret-id" not in text
    assert "made/up" not in text
    assert "NONSENSE" not in text
    assert "made_up_type" not in text
    samples = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    put = (("method", "PUT"), ("route", "/v1/tasks/{task_id}"), ("status", "202"))
    assert samples["inferq_http_requests_total", put] == 1
    gone = (("method", "GET"), ("route", "/v1/tasks/{task_id}"), ("status", "404"))
    assert samples["inferq_http_requests_total", gone] == 1
    unmatched = (("method", "GET"), ("route", "unmatched"), ("status", "404"))
    assert samples["inferq_http_requests_total", unmatched] == 1
    assert samples["inferq_tasks_submitted_total", (("task_type", "echo"),)] == 1
    assert samples["inferq_publish_seconds_count", ()] == 1


def test_the_openapi_document_spells_out_the_task_types(gateway: Gateway) -> None:
    document = gateway.get_openly("/openapi.json").json()
    body = document["paths"]["/v1/tasks"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    schema = {**body, "components": document["components"]}
    validator = Draft202012Validator(schema)
    assert validator.is_valid(ECHO)
    assert not validator.is_valid({**ECHO, "nonsense": 1})
    assert not validator.is_valid({"task_type": "nonsense"})
    assert not validator.is_valid({**ECHO, "batch_line": 1})
    for text, good in [
        ({}, False),
        ({"text": None}, False),
        ({"text": "a", "texts": ["b"]}, False),
        ({"text": "a", "text_url": None}, True),
        ({"texts": ["a"]}, True),
    ]:
        assert validator.is_valid({"task_type": "ner", **text}) == good, text
    for path, operations in document["paths"].items():
        for name, operation in operations.items():
            assert {"4XX", "5XX"} <= operation["responses"].keys(), (name, path)
            assert bool(operation["security"]) == path.startswith("/v1"), path
    assert not [name for name in document["components"]["schemas"] if "HTTPValidation" in name]
    batch = document["paths"]["/v1/batches"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    validator = Draft202012Validator({**batch, "components": document["components"]})
    assert validator.is_valid({"source": "inferq:a"})
    assert not validator.is_valid({"source": "inferq:a", "schedule": "night"})
    for name in ("Batch", "EchoTask", "NerTask"):
        # The gateway refuses another tenant than the API key's, also "default".
        assert "default" not in document["components"]["schemas"][name]["properties"]["tenant"]
    for path in ("/v1/tasks", "/v1/batches"):
        parameters = document["paths"][path]["get"]["parameters"]
        (cursor,) = (parameter["schema"] for parameter in parameters if parameter["name"] == "cursor")
        for value, status in [("1:a", 200), ("no", 422), ("MTph", 422), ("", 422)]:
            assert Draft202012Validator(cursor).is_valid(value) == (status == 200)
            assert gateway.http.get(path, params={"cursor": value}).status_code == status, (path, value)


def test_every_reference_in_the_openapi_document_leads_somewhere(gateway: Gateway) -> None:
    document = gateway.get_openly("/openapi.json").json()
    references = list(references_in(document))
    assert "#/components/schemas/Batch" in references
    for reference in references:
        found = document
        for name in reference.removeprefix("#/").split("/"):
            assert name in found, reference
            found = found[name]
    # Generators of clients fail on a union of strings with patterns.
    kind = document["components"]["schemas"]["Result"]["properties"]["task_type"]
    assert kind["type"] == "string"
    assert [Draft202012Validator(kind).is_valid(name) for name in ("", "ocr", "OCR")] == [True, True, False]
    assert document["servers"] == [{"url": gateway.url}]


def references_in(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        for name, value in part.items():
            if name == "$ref":
                yield value
            elif name == "mapping":
                yield from value.values()
            else:
                yield from references_in(value)
    elif isinstance(part, list):
        for value in part:
            yield from references_in(value)


def test_each_request_is_one_line_in_the_log(gateway: Gateway) -> None:
    trace = "0af7651916cd43dd8448eb211c80319c"
    with logged("inferq.access", logging.INFO) as lines:
        gateway.get_openly("/healthz")
        gateway.http.get("/v1/tasks/line%0Abreak?signature=secret")
        gateway.http.get("/unheard/of?secret", headers={"traceparent": f"00-{trace}-b7ad6b7169203331-01"})
        gateway.get_openly("/v1/tasks", headers={"Authorization": "Bearer iq_secret"})
        body = {"task_id": "logged", "task_type": "echo", "payload": "secret"}
        assert gateway.http.post("/v1/tasks", json=body).status_code == 202
        wait_until(lambda: len(lines) == 4)
    (key,) = [record for record in gateway.keys.list() if record.tenant == gateway.tenant]
    known = {"tenant": gateway.tenant, "key_id": key.key_id}
    everywhere = {"part": "test", "level": "INFO", "logger": "inferq.access", "client": "127.0.0.1"}
    varying = [{name: line.pop(name) for name in ("time", "seconds", "bytes")} for line in lines]
    assert [line | {"message": ""} for line in lines] == [
        everywhere | each | {"message": ""}
        for each in (
            {"task_id": "line\nbreak", "method": "GET", "route": "/v1/tasks/{task_id}", "status": 404}
            | known,
            {"trace_id": trace, "method": "GET", "route": "unmatched", "status": 404},
            {"method": "GET", "route": "/v1/tasks", "status": 401},
            {"task_id": "logged", "task_type": "echo", "method": "POST", "route": "/v1/tasks", "status": 202}
            | known,
        )
    ]
    assert all(each["seconds"] > 0 and each["bytes"] > 50 for each in varying)
    assert "secret" not in str(lines)


@pytest.mark.parametrize(
    ("trusted", "forwarded", "client"),
    [
        ("", "203.0.113.7", "127.0.0.1"),
        ("10.0.0.0/8", "203.0.113.7", "127.0.0.1"),
        ("127.0.0.1", "203.0.113.7", "203.0.113.7"),
        ("127.0.0.0/8,10.0.0.0/8", "8.8.8.8, 203.0.113.7, 10.1.2.3", "203.0.113.7"),
        ("127.0.0.1", "<script>", None),
    ],
)
async def test_a_client_address_is_believed_of_trusted_proxies_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trusted: str, forwarded: str, client: str | None
) -> None:
    monkeypatch.setenv("INFERQ_TRUSTED_PROXIES", trusted)
    stored = StorageSettings(store_url=tmp_path.as_uri(), redis_url="redis://127.0.0.1:1")
    app = create_app(
        GatewaySettings(api_keys_file=tmp_path / "keys"), storage=stored, publisher=FakePublisher()
    )
    transport = httpx.ASGITransport(app, client=("127.0.0.1", 1))
    with logged("inferq.access", logging.INFO) as lines:
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as http:
            await http.get("/v1/tasks", headers={"X-Forwarded-For": forwarded})
    assert [line.get("client") for line in lines] == [client]


def test_bad_trusted_proxies_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFERQ_TRUSTED_PROXIES", "proxy.example")
    with pytest.raises(InstallationError, match="INFERQ_TRUSTED_PROXIES: give networks such as"):
        GatewaySettings.load()


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ([], None),
        (["wait=5"], 5),
        (["wait=0"], 0),
        (["wait=100"], 60),
        (["respond-async, wait=7"], 7),
        (["return=minimal", "WAIT = 7; x=y"], 7),
        (['wait="9"'], 9),
        (["wait=-1"], None),
        (["wait=1.5"], None),
        (["wait=abc, wait=3"], 3),
        (["waiting=3"], None),
        (["wait"], None),
        (["wait=2, wait=9"], 2),
    ],
)
def test_the_prefer_header(headers: list[str], seconds: int | None) -> None:
    assert wait_seconds(headers) == seconds


@given(st.lists(st.text()))
def test_no_prefer_header_breaks_anything(headers: list[str]) -> None:
    seconds = wait_seconds(headers)
    assert seconds is None or 0 <= seconds <= 60


@given(st.binary() | st.text().map(str.encode))
def test_a_body_is_an_object_or_refused(body: bytes) -> None:
    try:
        assert isinstance(decode_json(body), dict)
    except InvalidTask as error:
        assert error.code == "not_json"


def test_an_answer_does_not_wait_for_the_clients_acknowledgement() -> None:
    """Headers and body are separate packets: with Nagle's algorithm the second waits up to 40 ms."""
    with (
        listen("127.0.0.1", 0) as listener,
        socket.create_connection(listener.getsockname()),
        listener.accept()[0] as accepted,
    ):
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_taken_port_is_a_clear_error() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = int(url_of(taken).rpartition(":")[2])
        with pytest.raises(InstallationError, match=f"cannot listen on 127.0.0.1:{port}"):
            listen("127.0.0.1", port)


def test_a_broken_key_file_is_an_error_of_the_start(tmp_path: Path, publisher: FakePublisher) -> None:
    keys = tmp_path / "keys.json"
    keys.write_text("{")
    with pytest.raises(InstallationError, match="INFERQ_API_KEYS_FILE"):
        create_app(GatewaySettings(api_keys_file=keys), storage=StorageSettings(), publisher=publisher)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_the_process_serves_until_a_signal_stops_it(
    tmp_path: Path, redis_url: str, amqp_url: str, how: signal.Signals
) -> None:
    script = (
        "from inferq.producer.gateway.server import serve\n"
        "serve(port=0, on_listening=lambda url: print(url, flush=True))"
    )
    environment = {
        **os.environ,
        "INFERQ_REDIS_URL": redis_url,
        "INFERQ_AMQP_URL": amqp_url,
        "INFERQ_STORE_URL": (tmp_path / "store").as_uri(),
        "INFERQ_API_KEYS_FILE": str(tmp_path / "keys.json"),
    }
    with subprocess.Popen(
        [sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()

        def lives() -> bool:
            try:
                return httpx.get(f"{url}/healthz", verify=False).status_code == 200
            except httpx.TransportError:
                return False

        wait_until(lives)
        process.send_signal(how)
        assert process.wait(15) == 0


def test_two_gateways_share_one_redis(tmp_path: Path, redis_url: str, publisher: FakePublisher) -> None:
    with running(tmp_path, redis_url=redis_url, publisher=publisher) as one:
        with running(tmp_path, redis_url=redis_url, publisher=publisher) as two:
            task = one.task("t", payload="hello")
            assert one.http.put("/v1/tasks/t", json=ECHO).status_code == 202
            with two.client(one.key) as client:
                assert client.put("/v1/tasks/t", json=ECHO).status_code == 202
                one.end(task)
                assert client.get("/v1/tasks/t").json()["state"] == "succeeded"
    assert publisher.ids() == ["t"]
