"""The gateway's API without the network: what to send, when to send it again, and what the answers mean.

A flow is a generator that yields what it wants done and is sent what came of it; the clients run it.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from inferq.schemas import (
    END_STATES,
    BatchStatus,
    CallbackEvent,
    CallbackRecord,
    Event,
    InferqError,
    Priority,
    Result,
    SubjectKind,
    TaskStatus,
)

_MAX_WAIT = 25
"""Seconds that one request waits: well below the 60 after which most proxies give up on an answer."""
_SHORTEST_WAIT = 0.5
_FIRST_DELAY = 0.25
_LONGEST_DELAY = 30.0
_STREAM_SILENCE = 60.0
_BATCH_LOOK = 1.0
_BUSY = (429, 502, 503, 504)
"""Answers of a gateway that may do it soon, or of a proxy before one that is away."""

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)


class ApiError(InferqError):
    """The gateway answered with a problem; `status` is None where nothing answered."""

    code = "api_error"

    def __init__(
        self,
        detail: str,
        *,
        code: str,
        status: int | None = None,
        title: str = "",
        errors: Sequence[Mapping[str, str]] = (),
    ) -> None:
        super().__init__(detail, code=code)
        self.detail = detail
        self.status = status
        self.title = title
        self.errors = tuple(errors)


class InvalidRequest(ApiError):
    """What was sent is wrong, and stays wrong; `errors` names the fields."""


class Unauthorized(ApiError):
    """The gateway does not know the API key, or it belongs to another tenant."""


class NotFound(ApiError):
    """There is no such task, artifact or file."""


class Conflict(ApiError):
    """The id belongs to a task with another content, or the task is past what was asked."""


class NotEnded(Conflict):
    """The task has not ended yet."""


class Unavailable(ApiError):
    """The gateway cannot be reached, or cannot do it at the moment."""


@dataclass(frozen=True)
class Send:
    """A request to be made. `patience` is in seconds, on top of the client's timeout."""

    method: str
    path: str
    params: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    patience: float = 0.0

    def arguments(self, timeout: float) -> dict[str, Any]:
        """The arguments of httpx's `request`."""
        return {
            "method": self.method,
            "url": self.path,
            "params": dict(self.params),
            "content": self.body,
            "headers": dict(self.headers),
            "timeout": httpx.Timeout(timeout, read=timeout + self.patience),
        }


@dataclass(frozen=True)
class Sleep:
    seconds: float


Outcome = httpx.Response | httpx.TransportError | None
Flow = Generator[Send | Sleep, Outcome, T]


class Page(BaseModel):
    """Some tasks; `cursor` leads to the next ones."""

    model_config = ConfigDict(frozen=True)

    items: tuple[TaskStatus, ...]
    cursor: str | None


class BatchPage(BaseModel):
    """Some batches; `cursor` leads to the next ones."""

    model_config = ConfigDict(frozen=True)

    items: tuple[BatchStatus, ...]
    cursor: str | None


class Callbacks(BaseModel):
    """What became of callbacks."""

    model_config = ConfigDict(frozen=True)

    items: tuple[CallbackRecord, ...]


class Uploaded(BaseModel):
    """What an upload answers."""

    model_config = ConfigDict(frozen=True)

    url: str
    sha256: str | None = None


class Flows:
    """Every call of the API. A failed one is tried `retries` times more where that may help."""

    def __init__(self, retries: int) -> None:
        self.retries = retries

    def request(self, send: Send, *, repeatable: bool = True) -> Flow[httpx.Response]:
        """One request, made until it is answered. Raises an ApiError for an answer that is a problem."""
        tried = 0
        while True:
            outcome = yield send
            if isinstance(outcome, httpx.Response) and outcome.status_code not in _BUSY:
                if outcome.is_success:
                    return outcome
                raise error_of(outcome)
            if not repeatable or tried >= self.retries:
                cause = outcome if isinstance(outcome, httpx.TransportError) else None
                raise error_of(outcome) from cause
            yield Sleep(delay(outcome, tried))
            tried += 1

    def submit(self, task: Mapping[str, JsonValue], wait: float | None) -> Flow[TaskStatus]:
        task_id = str(task["task_id"])
        begun = time.monotonic()
        headers, patience = _prefer(wait)
        body = json.dumps(task, ensure_ascii=False, allow_nan=False).encode("utf-8", "surrogatepass")
        headers["Content-Type"] = "application/json"
        send = Send("PUT", task_path(task_id), body=body, headers=headers, patience=patience)
        status = parsed(TaskStatus, (yield from self.request(send)))
        left = (wait or 0) - (time.monotonic() - begun)
        if status.ended or left <= 0:
            return status
        try:
            return (yield from self.waiting(task_id, left))
        except (NotFound, Unavailable):
            return status  # it is accepted, whoever is away: an error would have it submitted again

    def status(self, task_id: str) -> Flow[TaskStatus]:
        return parsed(TaskStatus, (yield from self.request(Send("GET", task_path(task_id)))))

    def waiting(self, task_id: str, seconds: float | None) -> Flow[TaskStatus]:
        """Where the task stands once it has ended, or after `seconds`."""
        end = None if seconds is None else time.monotonic() + seconds
        while True:
            begun = time.monotonic()
            headers, patience = _prefer(_MAX_WAIT if end is None else max(0.0, end - begun))
            send = Send("GET", task_path(task_id), headers=headers, patience=patience)
            status = parsed(TaskStatus, (yield from self.request(send)))
            now = time.monotonic()
            if status.ended or (end is not None and now >= end):
                return status
            if (
                now - begun < _SHORTEST_WAIT
            ):  # a gateway that stops lets nobody wait, nor does a part of a second
                yield Sleep(_SHORTEST_WAIT if end is None else min(_SHORTEST_WAIT, end - now))

    def wait(self, task_id: str, timeout: float | None) -> Flow[TaskStatus]:
        status = yield from self.waiting(task_id, timeout)
        if not status.ended:
            detail = f"task {task_id!r} is {status.state} after {timeout:g} s"
            raise NotEnded(detail, code="not_ended", status=409)
        return status

    def result(self, task_id: str, wait: float | None) -> Flow[Result]:
        if wait:
            yield from self.waiting(task_id, wait)
        return parsed(Result, (yield from self.request(Send("GET", f"{task_path(task_id)}/result"))))

    def cancel(self, task_id: str) -> Flow[TaskStatus]:
        return parsed(TaskStatus, (yield from self.request(Send("POST", f"{task_path(task_id)}/cancel"))))

    def submit_batch(self, batch: Mapping[str, JsonValue]) -> Flow[BatchStatus]:
        body = json.dumps(batch, ensure_ascii=False, allow_nan=False).encode("utf-8", "surrogatepass")
        send = Send("POST", "/v1/batches", body=body, headers={"Content-Type": "application/json"})
        return parsed(BatchStatus, (yield from self.request(send)))

    def batch(self, batch_id: str) -> Flow[BatchStatus]:
        return parsed(BatchStatus, (yield from self.request(Send("GET", batch_path(batch_id)))))

    def cancel_batch(self, batch_id: str) -> Flow[BatchStatus]:
        send = Send("POST", f"{batch_path(batch_id)}/cancel")
        return parsed(BatchStatus, (yield from self.request(send)))

    def batch_page(self, limit: int, cursor: str | None) -> Flow[BatchPage]:
        params = {"limit": str(limit), **({"cursor": cursor} if cursor is not None else {})}
        return parsed(BatchPage, (yield from self.request(Send("GET", "/v1/batches", params=params))))

    def wait_batch(self, batch_id: str, timeout: float | None) -> Flow[BatchStatus]:
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            status = yield from self.batch(batch_id)
            if status.ended:
                return status
            left = _BATCH_LOOK if end is None else end - time.monotonic()
            if left <= 0:
                detail = f"batch {batch_id!r} is {status.state} after {timeout:g} s"
                raise NotEnded(detail, code="not_ended", status=409)
            yield Sleep(min(_BATCH_LOOK, left))

    def callbacks(self, subject_id: str, kind: SubjectKind) -> Flow[Callbacks]:
        path = callbacks_path(subject_id, kind)
        return parsed(Callbacks, (yield from self.request(Send("GET", path))))

    def resend(self, subject_id: str, callback_id: str | None, kind: SubjectKind) -> Flow[Callbacks]:
        path = callbacks_path(subject_id, kind)
        path += f"/{quote(callback_id, safe='')}/resend" if callback_id else "/resend"
        return parsed(Callbacks, (yield from self.request(Send("POST", path))))

    def failed_callbacks(self, limit: int) -> Flow[Callbacks]:
        params = {"status": "failed", "limit": str(limit)}
        return parsed(Callbacks, (yield from self.request(Send("GET", "/v1/callbacks", params=params))))

    def page(self, filters: Mapping[str, object], cursor: str | None) -> Flow[Page]:
        params = {
            name: str(value) for name, value in {**filters, "cursor": cursor}.items() if value is not None
        }
        return parsed(Page, (yield from self.request(Send("GET", "/v1/tasks", params=params))))


def task_body(
    task_id: str,
    task_type: str,
    inputs: Mapping[str, JsonValue],
    *,
    options: Mapping[str, JsonValue] | None,
    priority: Priority,
    callback_url: str | None,
    callback_events: Sequence[CallbackEvent] | None,
    expires_at: datetime | str | None,
    time_limit: float | None,
    batch_id: str | None,
    metadata: Mapping[str, JsonValue] | None,
) -> dict[str, JsonValue]:
    """The task as it is sent: only what was said of it."""
    # What is of another type, as from a command line, is left as it is: the gateway tells what is wrong.
    said: dict[str, JsonValue] = {
        "options": dict(options) if options is not None else None,
        "callback_url": callback_url,
        "callback_events": list(callback_events)
        if isinstance(callback_events, Sequence)
        else callback_events,
        "expires_at": expires_at.astimezone().isoformat() if isinstance(expires_at, datetime) else expires_at,
        "time_limit": time_limit,
        "batch_id": batch_id,
        "metadata": dict(metadata) if isinstance(metadata, Mapping) else metadata,
    }
    kept = {name: value for name, value in said.items() if value is not None}
    return {"task_id": task_id, "task_type": task_type, "priority": priority, **kept, **inputs}


def task_path(task_id: str) -> str:
    # `.` and `..` are ids too, and a URL must not take them for folders.
    return f"/v1/tasks/{'%2E' * len(task_id) if task_id in ('.', '..') else quote(task_id, safe=':')}"


def batch_path(batch_id: str) -> str:
    return f"/v1/batches/{'%2E' * len(batch_id) if batch_id in ('.', '..') else quote(batch_id, safe=':')}"


def callbacks_path(subject_id: str, kind: SubjectKind) -> str:
    return f"{task_path(subject_id) if kind == 'task' else batch_path(subject_id)}/callbacks"


def batch_body(source: Uploaded | str, batch_id: str, said: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """The batch as it is sent: only what was said of it."""
    body: dict[str, JsonValue] = {"batch_id": batch_id}
    if isinstance(source, Uploaded):
        body |= {"source": source.url, "source_sha256": source.sha256}
    else:
        body["source"] = source
    return body | {name: value for name, value in said.items() if value is not None}


def artifact_path(task_id: str, name: str) -> str:
    return f"{task_path(task_id)}/artifacts/{quote(name, safe='')}"


def parsed(model: type[M], response: httpx.Response) -> M:
    """The answer as a model. Raises ApiError where something else than the gateway must have answered."""
    try:
        return model.model_validate_json(response.content)
    except ValidationError as error:
        raise ApiError(
            f"{response.request.url} answered no {model.__name__}; is INFERQ_API_URL right?",
            code="unexpected_answer",
            status=response.status_code,
        ) from error


def _whereabouts(outcome: object) -> str:
    request = getattr(outcome, "_request", None)  # its property raises where there is none
    if not isinstance(request, httpx.Request):
        return ""
    return f" at {request.url.scheme}://{request.url.netloc.decode()}"


def error_of(outcome: Outcome) -> ApiError:
    """The error that an answer, or the want of one, amounts to."""
    if not isinstance(outcome, httpx.Response):
        return Unavailable(
            f"the gateway{_whereabouts(outcome)} cannot be reached ({outcome or type(outcome).__name__}); "
            "is it up, and is INFERQ_API_URL right?",
            code="unreachable",
        )
    status = outcome.status_code
    try:
        problem = outcome.json()
    except ValueError:
        problem = None
    if not isinstance(problem, dict):
        problem = {"detail": f"{outcome.request.url} answered {status} {outcome.reason_phrase}"}
    code = str(problem.get("code", "api_error"))
    kinds: dict[int, type[ApiError]] = {
        400: InvalidRequest,
        401: Unauthorized,
        403: Unauthorized,
        404: NotFound,
        409: NotEnded if code == "not_ended" else Conflict,
        413: InvalidRequest,
        422: InvalidRequest,
        429: Unavailable,
        502: Unavailable,
        503: Unavailable,
        504: Unavailable,
    }
    return kinds.get(status, ApiError)(
        str(problem.get("detail", "")),
        code=code,
        status=status,
        title=str(problem.get("title", outcome.reason_phrase)),
        errors=problem.get("errors") or (),
    )


def delay(outcome: Outcome, tried: int) -> float:
    """Seconds to wait before the next try: what the gateway says, else longer each time, with jitter."""
    if isinstance(outcome, httpx.Response):
        with suppress(ValueError):
            said = float(outcome.headers.get("retry-after", ""))
            if said >= 0:
                return min(said, _LONGEST_DELAY)
    longest = min(_FIRST_DELAY * math.exp2(min(tried, 30)), _LONGEST_DELAY)
    return longest * random.uniform(0.5, 1.0)  # noqa: S311 - jitter


def _prefer(wait: float | None) -> tuple[dict[str, str], float]:
    """The header that asks the gateway to wait, and how long its answer may take for that."""
    seconds = min(int(wait or 0), _MAX_WAIT)
    return ({"Prefer": f"wait={seconds}"}, float(seconds)) if seconds > 0 else ({}, 0.0)


class Following:
    """The events of a task over one connection after the other: what is news, when it is over."""

    def __init__(self, task_id: str, retries: int) -> None:
        self.ended = False
        self._path = f"{task_path(task_id)}/events"
        self._retries = retries
        self._failures = 0
        self._pause = 0.0
        self._last: Event | None = None
        self._line = b""

    def arguments(self, timeout: float) -> dict[str, Any]:
        """The arguments of httpx's `stream` for the next connection."""
        self._line = b""
        self._pause = _SHORTEST_WAIT
        headers = {"Accept": "text/event-stream"}
        return Send("GET", self._path, headers=headers, patience=_STREAM_SILENCE).arguments(timeout)

    def news(self, chunk: bytes) -> list[Event]:
        """The events that this piece of the stream completes, without those that were told before."""
        # Lines end in LF here; httpx's own would also be cut at U+2028, which JSON may hold.
        *lines, self._line = (self._line + chunk).split(b"\n")
        found = []
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            event = Event.model_validate_json(line[5:].strip())
            self._failures = 0
            if self._last is None or event.data != self._last.data:
                found.append(event)
            self._last = event
            self.ended = event.data.state in END_STATES
        return found

    def failed(self, outcome: httpx.Response | httpx.TransportError) -> None:
        """The connection was refused or lost. Raises an ApiError where trying again is no use any more."""
        final = isinstance(outcome, httpx.Response) and outcome.status_code not in _BUSY
        if final or self._failures >= self._retries:
            raise error_of(outcome) from (outcome if isinstance(outcome, httpx.TransportError) else None)
        self._pause = delay(outcome, self._failures)
        self._failures += 1

    def pause(self) -> float:
        """Seconds to wait before the next connection."""
        return self._pause
