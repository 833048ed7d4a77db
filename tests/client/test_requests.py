"""The calls of the API as requests and replies, without a client or a gateway."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferq.producer.client.errors import ApiError, Conflict, InvalidRequest, NotEnded, Unavailable
from inferq.producer.client.requests import Api, Flow, Request, Sleep, retry_delay
from inferq.schemas import InferqError
from inferq.schemas.paths import task_path

TASK = {"task_id": "a", "task_type": "echo", "priority": "normal"}


class Exchange:
    """Runs flows with replies from a list. Time passes in pauses, and as long as a request asks to wait."""

    def __init__(self, *replies: httpx.Response | httpx.TransportError, waits: bool = True) -> None:
        self.replies = list(replies)
        self.requests: list[Request] = []
        self.pauses: list[float] = []
        self.api = Api(4, clock=lambda: self.now)
        self.now = 0.0
        self._waits = waits

    def run(self, flow: Flow[Any]) -> Any:
        reply = None
        while True:
            try:
                step = flow.send(reply)
            except StopIteration as done:
                return done.value
            reply = None
            if isinstance(step, Sleep):
                self.pauses.append(step.seconds)
                self.now += step.seconds
                continue
            self.requests.append(step)
            self.now += step.extra_timeout if self._waits else 0
            reply = self.replies.pop(0)
            reply.request = httpx.Request(step.method, f"http://gateway{step.path}")

    @property
    def waits(self) -> list[int]:
        """Seconds that each request asked to wait."""
        return [
            int(request.headers.get("Prefer", "wait=0").removeprefix("wait=")) for request in self.requests
        ]


def task(state: str = "queued") -> httpx.Response:
    return httpx.Response(200, json={"task_id": "a", "task_type": "echo", "tenant": "t", "state": state})


def batch(state: str) -> httpx.Response:
    content = {
        "batch_id": "b",
        "tenant": "t",
        "state": state,
        "source": "inferq:x",
        "created_at": "2030-01-01T00:00:00Z",
    }
    return httpx.Response(200, json=content)


def test_a_request_without_an_answer_is_sent_again_unchanged() -> None:
    exchange = Exchange(httpx.ReadError("lost"), httpx.ConnectError("refused"), task())
    assert exchange.run(exchange.api.submit(TASK, {"payload": 1}, None)).task_id == "a"
    assert len(exchange.requests) == 3
    assert exchange.requests == exchange.requests[:1] * 3
    first, second = exchange.pauses
    assert 0.125 <= first <= 0.25 <= second <= 0.5


def test_retry_after_is_honoured() -> None:
    values = ("7", "99999", "nonsense", "-1")
    busy = [httpx.Response(503, headers={"Retry-After": value}) for value in values]
    exchange = Exchange(*busy, task())
    exchange.run(exchange.api.status("a"))
    assert exchange.pauses[:2] == [7, 30]
    assert all(0 < pause <= 2 for pause in exchange.pauses[2:])


def test_a_proxy_without_its_gateway_is_asked_again() -> None:
    exchange = Exchange(*(httpx.Response(status, text="<html>") for status in (502, 504, 429)), task())
    assert exchange.run(exchange.api.status("a")).state == "queued"


def test_after_the_last_retry_the_gateway_is_unavailable() -> None:
    refused = httpx.ConnectError("refused")
    exchange = Exchange(*[httpx.Response(503)] * 4, refused)
    with pytest.raises(Unavailable, match="http://gateway") as caught:
        exchange.run(exchange.api.status("a"))
    assert caught.value.__cause__ is refused
    assert (caught.value.code, caught.value.status) == ("unreachable", None)
    assert len(exchange.pauses) == 4


def test_a_request_that_cannot_be_repeated_is_sent_once() -> None:
    exchange = Exchange(httpx.ConnectError("refused"))
    with pytest.raises(Unavailable):
        exchange.run(exchange.api.upload(repeatable=False))
    assert exchange.pauses == []


@pytest.mark.parametrize("status", [200, 404, 500, 502, 302])
def test_an_answer_of_another_server_is_an_error(status: int) -> None:
    exchange = Exchange(*(httpx.Response(status, text="<html>") for _ in range(5)))
    with pytest.raises(ApiError, match="http://gateway/v1/tasks/a") as caught:
        exchange.run(exchange.api.status("a"))
    assert caught.value.status == status
    assert isinstance(caught.value, InferqError)


@pytest.mark.parametrize(
    ("status", "code", "error"),
    [(409, "not_ended", NotEnded), (409, "id_conflict", Conflict), (422, "invalid_task", InvalidRequest)],
)
def test_an_error_has_the_fields_of_the_problem_document(
    status: int, code: str, error: type[ApiError]
) -> None:
    fields = [{"field": "x", "detail": "wrong"}]
    problem = {"title": "T", "detail": "D", "code": code, "errors": fields}
    exchange = Exchange(httpx.Response(status, json=problem))
    with pytest.raises(error) as caught:
        exchange.run(exchange.api.cancel("a"))
    assert type(caught.value) is error
    found = caught.value
    assert (found.status, found.code, found.title, found.detail) == (status, code, "T", "D")
    assert found.errors == tuple(fields)


def test_no_request_waits_as_long_as_a_proxy() -> None:
    exchange = Exchange(task(), task("running"), task("failed"))
    assert exchange.run(exchange.api.submit(TASK, {}, 600)).state == "failed"
    assert exchange.waits == [25, 25, 25]
    assert exchange.pauses == []
    exchange = Exchange(task("failed"))
    exchange.run(exchange.api.wait("a", None))
    assert exchange.waits == [25]


def test_a_wait_ends_after_its_time() -> None:
    exchange = Exchange(task(), task("running"), task("running"))
    with pytest.raises(NotEnded, match="running after 60 s") as caught:
        exchange.run(exchange.api.wait("a", 60))
    assert exchange.waits == [25, 25, 10]
    assert (exchange.now, caught.value.code, caught.value.status) == (60, "not_ended", 409)


def test_a_part_of_a_second_is_waited_here() -> None:
    exchange = Exchange(task(), task("running"))
    with pytest.raises(NotEnded):
        exchange.run(exchange.api.wait("a", 0.25))
    assert exchange.waits == [0, 0]
    assert exchange.pauses == [0.25]


def test_a_gateway_that_does_not_wait_is_asked_twice_a_second() -> None:
    exchange = Exchange(*(task() for _ in range(5)), task("failed"), waits=False)
    assert exchange.run(exchange.api.wait("a", None)).state == "failed"
    assert exchange.pauses == [0.5] * 5


def test_a_submission_that_waits_in_vain_returns_the_status() -> None:
    exchange = Exchange(task(), task("running"))
    assert exchange.run(exchange.api.submit(TASK, {}, 30)).state == "running"
    assert exchange.waits == [25, 5]


@pytest.mark.parametrize("fault", [404, 503, httpx.ConnectError("refused")], ids=["404", "503", "refused"])
def test_an_accepted_task_is_no_error_if_the_wait_fails(fault: int | httpx.TransportError) -> None:
    faults = [httpx.Response(fault) if isinstance(fault, int) else fault for _ in range(5)]
    exchange = Exchange(task(), *faults)
    status = exchange.run(exchange.api.submit(TASK, {}, 60))
    assert (status.task_id, status.state) == ("a", "queued")
    assert [request.method for request in exchange.requests[:2]] == ["PUT", "GET"]


def test_a_batch_is_looked_at_once_a_second_until_its_end() -> None:
    exchange = Exchange(batch("running"), batch("running"), batch("completed"))
    assert exchange.run(exchange.api.wait_batch("b", None)).state == "completed"
    assert exchange.pauses == [1, 1]
    exchange = Exchange(*(batch("running") for _ in range(4)))
    with pytest.raises(NotEnded, match=r"running after 2\.5 s"):
        exchange.run(exchange.api.wait_batch("b", 2.5))
    assert exchange.pauses == [1, 1, 0.5]


def test_a_body_has_the_fields_that_were_given() -> None:
    exchange = Exchange(task())
    fields: dict[str, object] = {
        **TASK,
        "options": MappingProxyType({"x": 1}),
        "expires_at": datetime(2100, 1, 1, tzinfo=UTC),
        "time_limit": None,
    }
    exchange.run(exchange.api.submit(fields, {"payload": None, "text": "\ud800ü"}, None))
    (request,) = exchange.requests
    assert request.body is not None
    body = json.loads(request.body.decode("utf-8", "surrogatepass"))
    assert datetime.fromisoformat(body.pop("expires_at")) == datetime(2100, 1, 1, tzinfo=UTC)
    assert body == {**TASK, "options": {"x": 1}, "payload": None, "text": "\ud800ü"}


@pytest.mark.parametrize("value", [b"x", bytearray(b"x"), {1}, object()])
def test_a_value_without_a_form_in_json_is_a_type_error(value: Any) -> None:
    exchange = Exchange()
    with pytest.raises(TypeError, match=type(value).__name__):
        exchange.run(exchange.api.submit(TASK, {"payload": value}, None))


@given(st.integers(0, 5000), st.sampled_from([None, "1", "1e9", "nan", "inf", "x"]))
def test_a_delay_is_never_negative_or_long(failures: int, retry_after: str | None) -> None:
    headers = {"Retry-After": retry_after} if retry_after else {}
    assert 0 <= retry_delay(httpx.Response(503, headers=headers), failures) <= 30


@given(st.text(min_size=1))
def test_every_id_is_one_segment_of_the_path(task_id: str) -> None:
    task_id = task_id.encode("utf-8", "replace").decode()
    url = httpx.URL("http://x").join(task_path(task_id))
    assert url.raw_path.startswith(b"/v1/tasks/")
    assert url.raw_path.count(b"/") == 3
    assert b"?" not in url.raw_path
