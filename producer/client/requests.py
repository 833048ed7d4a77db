"""The calls of the gateway's API, without a network.

Each call is a flow: a generator that yields a `Request` or a `Sleep` and receives the `Reply`. Its return value is
the call's. A client runs it (`_run`), and a test can drive it with replies of its own.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from inferq.producer.client.errors import (
    ApiError,
    Conflict,
    InvalidRequest,
    NotEnded,
    NotFound,
    Unauthorized,
    Unavailable,
)
from inferq.schemas import BatchStatus, CallbackRecord, Result, SubjectKind, TaskStatus, tracing
from inferq.schemas.monitor import Demand, Stats, WorkerList
from inferq.schemas.paths import batch_path, task_path

MIN_POLL_SECONDS = 0.5
"""A gateway that is shutting down answers a wait at once, and one of less than a second does not wait."""
_MAX_WAIT_SECONDS = 25
"""The longest wait of one request: most proxies drop a request after 60 seconds."""
_BATCH_POLL_SECONDS = 1.0
_FIRST_DELAY_SECONDS = 0.25
_MAX_DELAY_SECONDS = 30.0
_ERRORS: Mapping[int, type[ApiError]] = {
    400: InvalidRequest,
    401: Unauthorized,
    403: Unauthorized,
    404: NotFound,
    409: Conflict,
    413: InvalidRequest,
    422: InvalidRequest,
    429: Unavailable,
    502: Unavailable,
    503: Unavailable,
    504: Unavailable,
}

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True)
class Request:
    """An HTTP request. Its reply may take `extra_timeout` seconds longer than the client's timeout."""

    method: str
    path: str
    params: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    extra_timeout: float = 0.0

    def arguments(self, timeout: float) -> dict[str, Any]:
        """The arguments of httpx's `request`. `timeout` is the client's, in seconds."""
        return {
            "method": self.method,
            "url": self.path,
            "params": dict(self.params),
            "content": self.body,
            "headers": {**tracing.outgoing_headers(), **self.headers},
            "timeout": httpx.Timeout(timeout, read=timeout + self.extra_timeout),
        }


@dataclass(frozen=True)
class Sleep:
    seconds: float


Reply = httpx.Response | httpx.TransportError
Flow = Generator[Request | Sleep, Any, T]
"""A call of the API. It receives a `Reply` for each `Request`, and None after a `Sleep`."""


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True)


class TaskPage(_Answer):
    """One page of the list of tasks. `cursor` leads to the next page; it is None on the last one."""

    items: tuple[TaskStatus, ...]
    cursor: str | None


class BatchPage(_Answer):
    """One page of the list of batches. `cursor` leads to the next page; it is None on the last one."""

    items: tuple[BatchStatus, ...]
    cursor: str | None


class CallbackList(_Answer):
    """Records of callbacks."""

    items: tuple[CallbackRecord, ...]


class UploadedFile(_Answer):
    """The `inferq:` URL of an uploaded file, and the SHA-256 of its content in hexadecimal."""

    url: str
    sha256: str | None = None


class Api:
    """Every call of the API, as a flow. A request that fails is repeated up to `retries` times if that can help.

    `clock` gives seconds and never goes back.
    """

    def __init__(self, retries: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.retries = retries
        self._clock = clock

    def request(self, request: Request, *, repeatable: bool = True) -> Flow[httpx.Response]:
        """Send a request until it succeeds. Raises an ApiError for an error answer."""
        failures = 0
        while True:
            reply: Reply = yield request
            if isinstance(reply, httpx.Response) and reply.is_success:
                return reply
            if not is_retriable(reply) or not repeatable or failures >= self.retries:
                raise error_of(reply) from (reply if isinstance(reply, httpx.TransportError) else None)
            yield Sleep(retry_delay(reply, failures))
            failures += 1

    def submit(
        self, fields: Mapping[str, object], inputs: Mapping[str, JsonValue], wait: float | None
    ) -> Flow[TaskStatus]:
        """`fields` are the task's own; those that are None are left out. `inputs` are those of its type."""
        task_id = str(fields["task_id"])
        start = self._clock()
        headers, extra_timeout = _prefer_wait(wait)
        headers["Content-Type"] = "application/json"
        body = _json({**_given(fields), **inputs})
        request = Request("PUT", task_path(task_id), body=body, headers=headers, extra_timeout=extra_timeout)
        status = _parse(TaskStatus, (yield from self.request(request)))
        left = (wait or 0) - (self._clock() - start)
        if status.ended or left <= 0:
            return status
        try:
            return (yield from self._poll(task_id, left))
        except (NotFound, Unavailable):
            return status  # The task is accepted. An error would make the caller submit it again.

    def status(self, task_id: str) -> Flow[TaskStatus]:
        return _parse(TaskStatus, (yield from self.request(Request("GET", task_path(task_id)))))

    def wait(self, task_id: str, timeout: float | None) -> Flow[TaskStatus]:
        status = yield from self._poll(task_id, timeout)
        if not status.ended:
            detail = f"task {task_id!r} is {status.state} after {timeout:g} s"
            raise NotEnded(detail, code="not_ended", status=409)
        return status

    def result(self, task_id: str, wait: float | None) -> Flow[Result]:
        if wait:
            yield from self._poll(task_id, wait)
        return _parse(Result, (yield from self.request(Request("GET", f"{task_path(task_id)}/result"))))

    def cancel(self, task_id: str) -> Flow[TaskStatus]:
        return _parse(TaskStatus, (yield from self.request(Request("POST", f"{task_path(task_id)}/cancel"))))

    def tasks(self, filters: Mapping[str, object], cursor: str | None) -> Flow[TaskPage]:
        params = {name: str(value) for name, value in _given({**filters, "cursor": cursor}).items()}
        return _parse(TaskPage, (yield from self.request(Request("GET", "/v1/tasks", params))))

    def submit_batch(self, fields: Mapping[str, object]) -> Flow[BatchStatus]:
        """`fields` are the batch's own; those that are None are left out."""
        headers = {"Content-Type": "application/json"}
        request = Request("POST", "/v1/batches", body=_json(_given(fields)), headers=headers)
        return _parse(BatchStatus, (yield from self.request(request)))

    def batch(self, batch_id: str) -> Flow[BatchStatus]:
        return _parse(BatchStatus, (yield from self.request(Request("GET", batch_path(batch_id)))))

    def wait_batch(self, batch_id: str, timeout: float | None) -> Flow[BatchStatus]:
        end = None if timeout is None else self._clock() + timeout
        while True:
            status = yield from self.batch(batch_id)
            if status.ended:
                return status
            left = _BATCH_POLL_SECONDS if end is None else end - self._clock()
            if left <= 0:
                detail = f"batch {batch_id!r} is {status.state} after {timeout:g} s"
                raise NotEnded(detail, code="not_ended", status=409)
            yield Sleep(min(_BATCH_POLL_SECONDS, left))

    def cancel_batch(self, batch_id: str) -> Flow[BatchStatus]:
        request = Request("POST", f"{batch_path(batch_id)}/cancel")
        return _parse(BatchStatus, (yield from self.request(request)))

    def batches(self, page_size: int, cursor: str | None) -> Flow[BatchPage]:
        params = {name: str(value) for name, value in _given({"limit": page_size, "cursor": cursor}).items()}
        return _parse(BatchPage, (yield from self.request(Request("GET", "/v1/batches", params))))

    def callbacks(self, subject_id: str, kind: SubjectKind) -> Flow[Sequence[CallbackRecord]]:
        request = Request("GET", _callbacks_path(subject_id, kind))
        return _parse(CallbackList, (yield from self.request(request))).items

    def resend(
        self, subject_id: str, callback_id: str | None, kind: SubjectKind
    ) -> Flow[Sequence[CallbackRecord]]:
        path = _callbacks_path(subject_id, kind)
        path += f"/{quote(callback_id, safe='')}/resend" if callback_id else "/resend"
        return _parse(CallbackList, (yield from self.request(Request("POST", path)))).items

    def failed_callbacks(self, limit: int) -> Flow[Sequence[CallbackRecord]]:
        request = Request("GET", "/v1/callbacks", {"status": "failed", "limit": str(limit)})
        return _parse(CallbackList, (yield from self.request(request))).items

    def stats(self) -> Flow[Stats]:
        return _parse(Stats, (yield from self.request(Request("GET", "/v1/stats"))))

    def demand(self, target_wait: float | None) -> Flow[Demand]:
        params = {name: str(value) for name, value in _given({"target_wait": target_wait}).items()}
        return _parse(Demand, (yield from self.request(Request("GET", "/v1/demand", params))))

    def workers(self) -> Flow[WorkerList]:
        return _parse(WorkerList, (yield from self.request(Request("GET", "/v1/workers"))))

    def upload(self, *, repeatable: bool) -> Flow[UploadedFile]:
        """The client adds the file itself."""
        request = Request("POST", "/v1/files")
        return _parse(UploadedFile, (yield from self.request(request, repeatable=repeatable)))

    def _poll(self, task_id: str, seconds: float | None) -> Flow[TaskStatus]:
        """The task's status after its end, or after `seconds`."""
        end = None if seconds is None else self._clock() + seconds
        while True:
            start = self._clock()
            headers, extra_timeout = _prefer_wait(_MAX_WAIT_SECONDS if end is None else max(0.0, end - start))
            request = Request("GET", task_path(task_id), headers=headers, extra_timeout=extra_timeout)
            status = _parse(TaskStatus, (yield from self.request(request)))
            now = self._clock()
            if status.ended or (end is not None and now >= end):
                return status
            if now - start < MIN_POLL_SECONDS:
                yield Sleep(MIN_POLL_SECONDS if end is None else min(MIN_POLL_SECONDS, end - now))


def is_retriable(reply: Reply) -> bool:
    """Whether the same request may succeed later: there is no connection, or the gateway or a proxy is busy."""
    return not isinstance(reply, httpx.Response) or _ERRORS.get(reply.status_code) is Unavailable


def retry_delay(reply: Reply, failures: int) -> float:
    """Seconds before the next try: the reply's `Retry-After`, or else a delay that doubles, with jitter.

    At most 30 seconds. `failures` is the number of failed tries before this one.
    """
    if isinstance(reply, httpx.Response):
        with suppress(ValueError):
            seconds = float(reply.headers.get("retry-after", ""))
            if seconds >= 0:
                return min(seconds, _MAX_DELAY_SECONDS)
    longest = min(_FIRST_DELAY_SECONDS * math.exp2(min(failures, 30)), _MAX_DELAY_SECONDS)
    return longest * random.uniform(0.5, 1.0)  # noqa: S311 - jitter


def error_of(reply: Reply) -> ApiError:
    """The error that a reply without success stands for."""
    if not isinstance(reply, httpx.Response):
        return Unavailable(
            f"the gateway{_origin_of(reply)} cannot be reached ({reply or type(reply).__name__}); "
            "check that it is running and that INFERQ_API_URL is right",
            code="unreachable",
        )
    status = reply.status_code
    try:
        problem = reply.json()
    except ValueError:
        problem = None
    if not isinstance(problem, dict):
        problem = {"detail": f"{reply.request.url} answered {status} {reply.reason_phrase}"}
    code = str(problem.get("code", "api_error"))
    error = NotEnded if status == 409 and code == "not_ended" else _ERRORS.get(status, ApiError)
    return error(
        str(problem.get("detail", "")),
        code=code,
        status=status,
        title=str(problem.get("title", reply.reason_phrase)),
        errors=problem.get("errors") or (),
    )


def _origin_of(error: httpx.TransportError) -> str:
    try:
        url = error.request.url
    except RuntimeError:  # the error was raised before there was a request
        return ""
    return f" at {url.scheme}://{url.netloc.decode()}"


def _parse(model: type[M], response: httpx.Response) -> M:
    """The response's body as a model. Raises ApiError if it is not one: then it is not the gateway's."""
    try:
        return model.model_validate_json(response.content)
    except ValidationError as error:
        raise ApiError(
            f"{response.request.url} did not answer with a {model.__name__}; check that INFERQ_API_URL is the gateway",
            code="unexpected_answer",
            status=response.status_code,
        ) from error


def _prefer_wait(seconds: float | None) -> tuple[dict[str, str], float]:
    """The header that asks the gateway to wait for the task's end, and by how many seconds the reply may be later.

    https://www.rfc-editor.org/rfc/rfc7240#section-4.3
    """
    whole = min(int(seconds or 0), _MAX_WAIT_SECONDS)
    return ({"Prefer": f"wait={whole}"}, float(whole)) if whole > 0 else ({}, 0.0)


def _given(fields: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in fields.items() if value is not None}


def _json(content: Mapping[str, object]) -> bytes:
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, default=_plain)
    # The gateway says which field holds a surrogate; here it would be an error without a name.
    return text.encode("utf-8", "surrogatepass")


def _plain(value: object) -> object:
    if isinstance(value, datetime):
        return value.astimezone().isoformat()
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return list(value)
    raise TypeError(f"{type(value).__name__} cannot be sent as JSON")


def _callbacks_path(subject_id: str, kind: SubjectKind) -> str:
    return f"{task_path(subject_id) if kind == 'task' else batch_path(subject_id)}/callbacks"
