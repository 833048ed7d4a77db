"""The real gateway behind the real nginx, with the configuration of deploy/nginx."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import re
import socket
import ssl
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from inferq.producer.gateway.prefer import MAX_WAIT
from inferq.producer.gateway.server import _KEEP_ALIVE_SECONDS
from inferq.producer.gateway.settings import GatewaySettings
from inferq.producer.up.part import free_ports
from tests.deploy.nginx import CONFIGURATION, Nginx, Ports, running_nginx
from tests.gateway.conftest import FakePublisher, Gateway, as_new_tenant, running
from tests.gateway.test_gateway_events import Stream
from tests.gateway.test_gateway_results import with_artifact
from tests.gateway.test_gateway_submit import ECHO, problem
from tests.logged import logged
from tests.waiting import eventually

_MB = 1 << 20
PATH = "/inferq"
_addresses = itertools.count(10)


class Edge:
    """An nginx, the gateway behind it, and a tenant for one test."""

    def __init__(self, nginx: Nginx, gateway: Gateway) -> None:
        self.nginx = nginx
        self.gateway = gateway
        self.http = nginx.client(gateway.key, path=PATH)


@pytest.fixture(scope="module")
def publisher() -> FakePublisher:
    return FakePublisher()


@pytest.fixture(scope="module")
def shared(
    tmp_path_factory: pytest.TempPathFactory, redis_url: str, publisher: FakePublisher
) -> Iterator[Edge]:
    ports = Ports()
    with ExitStack() as stack:
        gateway = stack.enter_context(
            running(
                tmp_path_factory.mktemp("gateway"),
                redis_url=redis_url,
                publisher=publisher,
                storage={"api_url": f"{ports.url}{PATH}"},
                trusted_proxies="127.0.0.1",
                max_connections_per_address=4,
                body_timeout=1.0,
            )
        )
        nginx = stack.enter_context(running_nginx(tmp_path_factory.mktemp("nginx"), gateway.url, ports))
        yield Edge(nginx, gateway)


@pytest.fixture
def edge(shared: Edge) -> Iterator[Edge]:
    edge = Edge(shared.nginx, as_new_tenant(shared.gateway))
    with edge.http, edge.gateway.http:
        yield edge


def _peak_bytes() -> int:
    """The most memory of this process since it was cleared; it holds the gateway and its client."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text("utf-8"))[1]) << 10  # type: ignore[index]


def test_an_upload_of_200_mb_is_passed_on_while_it_arrives(edge: Edge) -> None:
    chunk, seen = os.urandom(_MB), hashlib.sha256()
    partial = edge.gateway.folder / "store/.inferq/partial"

    def chunks() -> Iterator[bytes]:
        for number in range(200):
            if number == 100:
                assert edge.nginx.on_disk() == []
                eventually(lambda: any(path.stat().st_size > 90 * _MB for path in partial.rglob("*")))
            seen.update(chunk)
            yield chunk

    Path("/proc/self/clear_refs").write_text("5", "utf-8")
    before = _peak_bytes()
    answer = edge.http.post("/v1/files", params={"filename": "secret-name.bin"}, content=chunks())
    assert answer.status_code == 201, answer.text
    assert (answer.json()["bytes"], answer.json()["sha256"]) == (200 * _MB, seen.hexdigest())
    assert _peak_bytes() - before < 40 * _MB


@pytest.mark.parametrize(
    ("size", "known", "status"),
    [(64 * _MB, False, 401), (550 * _MB, True, 413), (601 * _MB, True, 413)],
    ids=["no key", "too large for the gateway", "too large for nginx"],
)
def test_the_reason_of_a_refused_upload_reaches_the_client_while_it_sends(
    edge: Edge, size: int, known: bool, status: int
) -> None:
    key = edge.gateway.key if known else "none"
    with _connection(edge) as stream:
        stream.sendall(_head(edge, "files", size, key) + bytes(_MB))
        answer = stream.recv(4096)
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert b"application/problem+json" in answer


def _connection(edge: Edge) -> ssl.SSLSocket:
    port = urlsplit(edge.nginx.url).port
    stream = socket.create_connection(("127.0.0.1", port or 0), timeout=20)
    return edge.nginx.trusting.wrap_socket(stream)


def _head(edge: Edge, path: str, size: int, key: str) -> bytes:
    lines = (
        f"POST {PATH}/v1/{path} HTTP/1.1",
        "Host: x",
        f"Authorization: Bearer {key}",
        "Content-Type: application/json",
        f"Content-Length: {size}",
        "\r\n",
    )
    return "\r\n".join(lines).encode()


def test_events_arrive_while_the_task_runs(edge: Edge) -> None:
    task = edge.gateway.began("live")
    with edge.http.stream("GET", "/v1/tasks/live/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = Stream(answer).events()
        assert next(events)["data"]["state"] == "running"
        edge.gateway.status.progress(edge.gateway.tenant, "live", 0.5, "half way")
        assert next(events)["data"]["progress"] == 0.5
        edge.gateway.end(task)
        assert next(events)["type"] == "task.succeeded"
        assert next(events, None) is None


def test_many_clients_may_follow_tasks_at_once(edge: Edge) -> None:
    """To the gateway all of them have one address."""
    task = edge.gateway.began("followed")
    with ExitStack() as stack:
        for _ in range(6):
            answer = stack.enter_context(edge.http.stream("GET", "/v1/tasks/followed/events"))
            assert answer.status_code == 200
        edge.gateway.end(task)


def test_a_client_waits_for_the_end_of_its_task(edge: Edge, publisher: FakePublisher) -> None:
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(
            edge.http.put, "/v1/tasks/awaited", json=ECHO, headers={"Prefer": f"wait={MAX_WAIT}"}
        )
        eventually(lambda: "awaited" in publisher.ids())
        edge.gateway.end(edge.gateway.began("awaited", payload="hello"))
        answer = waiting.result()
    assert (answer.status_code, answer.json()["state"]) == (200, "succeeded"), answer.text


def test_the_time_outs_of_nginx_fit_those_of_the_gateway() -> None:
    proxy = (CONFIGURATION / "inferq/proxy.conf").read_text("utf-8")
    server = (CONFIGURATION / "inferq.conf").read_text("utf-8")
    assert _number(proxy, "proxy_read_timeout") == 300 > 2 * MAX_WAIT
    assert 2 * GatewaySettings().events_heartbeat < 300
    # Otherwise a request meets a connection that the gateway closes at the same moment.
    assert _number(server, "keepalive_timeout") < _KEEP_ALIVE_SECONDS
    assert _number(server, "client_max_body_size") * _MB > GatewaySettings().max_upload_bytes


def _number(text: str, directive: str) -> int:
    found = re.search(rf"^ *{directive} +(\d+)[sm];", text, re.MULTILINE)
    assert found, directive
    return int(found[1])


@pytest.mark.parametrize("strips", [False, True], ids=["kept", "stripped"])
def test_every_link_of_an_answer_leads_back_through_nginx(edge: Edge, tmp_path: Path, strips: bool) -> None:
    name = "a b%2F?#+ü.png"
    task = with_artifact(edge.gateway, tmp_path, name=name, data=b"picture")
    with ExitStack() as stack:
        nginx, ports = edge.nginx, Ports()
        if strips:  # another nginx before the same gateway; its links name the first one
            (tmp_path / "nginx").mkdir()
            edit = lambda text: text.replace("#rewrite", "rewrite")  # noqa: E731
            nginx = stack.enter_context(running_nginx(tmp_path / "nginx", edge.gateway.url, ports, edit=edit))
        client = stack.enter_context(nginx.client(edge.gateway.key))
        submitted = client.put(f"{PATH}/v1/tasks/linked", json=ECHO)
        result = client.get(f"{PATH}/v1/tasks/{task.task_id}/result")
        listed = client.get(f"{PATH}/v1/tasks?limit=1")
        assert [each.status_code for each in (submitted, result, listed)] == [202, 200, 200]
        text = " ".join(each.text + " ".join(each.headers.values()) for each in (submitted, result, listed))
        links = set(re.findall(r'[^"<> ]*/v1/[^"<> ]*', text))
        assert len(links) >= 6
        for link in links:
            assert urlsplit(link).path.startswith(f"{PATH}/v1/")
            if not link.endswith(("/cancel", "/events")):
                answer = client.get(link.removeprefix(edge.nginx.url))
                assert answer.status_code == (409 if link.endswith("linked/result") else 200), (
                    link,
                    answer.text,
                )
        (artifact,) = result.json()["artifacts"]
        assert artifact["url"].startswith(f"{edge.nginx.url}{PATH}/v1/")
        assert client.get(artifact["url"].removeprefix(edge.nginx.url)).content == b"picture"


def test_both_logs_have_the_clients_own_address_and_no_query(edge: Edge) -> None:
    forged = {"X-Forwarded-For": "203.0.113.7", "X-Real-IP": "203.0.113.7", "Forwarded": "for=203.0.113.7"}
    with logged("inferq.access", logging.INFO) as lines:
        edge.http.get("/v1/tasks/mine", params={"token": "secret"}, headers=forged)
        eventually(lambda: lines)
    assert [line["client"] for line in lines] == ["127.0.0.2"]
    last = json.loads(eventually(lambda: [line for line in edge.nginx.log() if "mine" in line])[-1])
    assert (last["client"], last["path"], last["status"]) == ("127.0.0.2", f"{PATH}/v1/tasks/mine", 404)
    whole = "\n".join(edge.nginx.log())
    assert not re.search(rf"secret|203\.0\.113|\?|{edge.gateway.key}", whole)
    assert all(json.loads(line)["client"].startswith("127.0.0.") for line in edge.nginx.log())


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/v1/tasks", ECHO),
        ("PUT", "/v1/tasks/fast-{}", ECHO),
        ("POST", "/v1/batches", {"source": "s3://bucket/a.jsonl", "task_type": "echo"}),
    ],
)
def test_each_address_may_submit_five_times_a_second_and_ten_times_at_once(
    edge: Edge, method: str, path: str, body: dict[str, str]
) -> None:
    address = f"127.0.0.{next(_addresses)}"
    with edge.nginx.client(edge.gateway.key, address=address, path=PATH) as busy:
        answers = [busy.request(method, path.format(number), json=body) for number in range(30)]
        refused = [answer for answer in answers if answer.status_code != 202]
        assert [answer.status_code for answer in answers[:11]] == 11 * [202]
        assert refused
        for answer in refused:
            problem(answer, 429, "rate_limited")
            assert answer.headers["retry-after"] == "1"
        assert busy.get("/v1/tasks").status_code == 200, "reading is not limited"
        assert edge.http.post("/v1/tasks", json=ECHO).status_code == 202, "others are not limited"
        eventually(lambda: busy.request(method, path.format("x"), json=body).status_code == 202)


def test_a_slow_client_holds_nothing_up(edge: Edge, tmp_path: Path) -> None:
    body = json.dumps(ECHO).encode()
    data = os.urandom(8 * _MB)
    task = with_artifact(edge.gateway, tmp_path, data=data)
    with _connection(edge) as sender, _connection(edge) as uploader:
        with edge.http.stream("GET", f"/v1/tasks/{task.task_id}/artifacts/a.txt") as answer:
            received = answer.iter_raw(1000)
            first = next(received)
            sender.sendall(_head(edge, "tasks", len(body), edge.gateway.key) + body[:5])
            uploader.sendall(_head(edge, "files", len(body), edge.gateway.key) + body[:5])
            # The gateway sees the upload, and gives it up after INFERQ_BODY_TIMEOUT. It does not see the task yet.
            assert uploader.recv(100).startswith(b"HTTP/1.1 408 ")
            assert edge.http.get("/v1/tasks").status_code == 200
            sender.sendall(body[5:])
            assert sender.recv(100).startswith(b"HTTP/1.1 202 ")
            assert edge.nginx.on_disk() == []
            assert first + b"".join(received) == data


def test_figures_and_probes_are_not_for_everyone(edge: Edge) -> None:
    with edge.nginx.client(address="127.0.0.1") as here, edge.nginx.client() as elsewhere:
        for path in ("/metrics", "/readyz", f"{PATH}/healthz"):
            assert here.get(path).status_code == 200
            problem(elsewhere.get(path), 403, "forbidden")


def test_a_request_without_tls_is_sent_to_the_address_with_it(edge: Edge) -> None:
    answer = httpx.get(f"{edge.nginx.plain_url}/v1/tasks?a=b", trust_env=False)
    assert (answer.status_code, answer.headers["location"]) == (
        301,
        "https://inferq.example.com/v1/tasks?a=b",
    )


def test_a_gateway_that_does_not_answer_is_a_problem_document(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    with running_nginx(tmp_path, f"http://127.0.0.1:{port}", Ports()) as nginx, nginx.client() as client:
        answer = client.post("/v1/tasks", json=ECHO)
        problem(answer, 503, "gateway_unavailable")
        assert answer.headers["retry-after"] == "5"
        problem(client.post("/v1/tasks", content=bytes(2 * _MB)), 413, "too_large")


class _SignOn(BaseHTTPRequestHandler):
    """Knows one person, by a cookie."""

    key = ""

    def do_GET(self) -> None:
        known = self.headers["Cookie"] == "session=ours" and self.headers["X-Original-Path"] == "/v1/tasks"
        self.send_response(200 if known else 401)
        self.send_header("X-Inferq-Key", self.key)
        self.end_headers()

    def log_message(self, *_arguments: object) -> None:
        return


def test_another_service_may_say_who_a_client_is(edge: Edge, tmp_path: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("SignOn", (_SignOn,), {"key": edge.gateway.key}))
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    port = server.server_address[1]

    def edit(text: str) -> str:
        return text.replace("#include inferq/auth", "include inferq/auth").replace(
            "127.0.0.1:9200", f"127.0.0.1:{port}"
        )

    with running_nginx(tmp_path, edge.gateway.url, Ports(), edit=edit) as nginx, nginx.client() as client:
        problem(client.post("/v1/tasks", json=ECHO), 401, "unauthorized")
        problem(client.get("/v1/tasks", headers={"X-Inferq-Key": edge.gateway.key}), 401, "unauthorized")
        answer = client.post("/v1/tasks", json=ECHO, headers={"Cookie": "session=ours"})
        assert answer.status_code == 202, answer.text
    server.shutdown()
    server.server_close()
