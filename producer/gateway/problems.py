"""Every error as a problem document (RFC 9457): which exception gives which status, in one place."""

from __future__ import annotations

import http
import json
import logging
import math
from collections.abc import Mapping
from typing import Any, cast

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from inferq.schemas import InferqError, InvalidTask, Outage, describe_faults

MEDIA_TYPE = "application/problem+json"

_DETAIL_LIMIT = 4000
_ERRORS_LIMIT = 50
_RETRY_AFTER = 5.0
_OUTAGES = {
    "broker_unavailable": "the queue is away, so that the task was not taken",
    "publish_rejected": "the queue is full, so that the task was not taken",
    "unroutable": "no queue takes tasks of this type yet",
    "status_unavailable": "the status index is away",
    "store_unavailable": "the object store is away",
}

_log = logging.getLogger(__name__)


class Fault(BaseModel):
    """What is wrong with one field of a request."""

    model_config = ConfigDict(frozen=True)

    field: str
    detail: str


class Problem(BaseModel):
    """A problem document. `code` is the stable name of the problem; `errors` stands where a form is wrong.

    A problem may say more: `task_id` and `state` of the task that it is about.
    """

    model_config = ConfigDict(frozen=True)

    type: str
    title: str
    status: int
    detail: str
    code: str
    errors: tuple[Fault, ...] | None = None
    task_id: str | None = None
    batch_id: str | None = None
    state: str | None = None


class Refused(InferqError):
    """The gateway answers a request with a problem; `about` are further members of the document."""

    code = "refused"

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        headers: Mapping[str, str] | None = None,
        about: Mapping[str, Any] | None = None,
        errors: tuple[Fault, ...] | None = None,
    ) -> None:
        super().__init__(message, code=code)
        self.status = status
        self.headers = dict(headers or {})
        self.about = dict(about or {})
        self.errors = errors


def not_found(what: str) -> Refused:
    return Refused(404, "not_found", f"{what} does not exist")


def register(app: FastAPI) -> None:
    """Have `app` answer every error with a problem document."""
    app.add_exception_handler(InferqError, _answer_ours)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(RequestValidationError, _answer_invalid_request)
    app.add_exception_handler(ClientDisconnect, _answer_nobody)
    app.add_exception_handler(Exception, _answer_unexpected)


def refusal_of(error: InferqError) -> Refused:
    """What the gateway answers to an error of ours."""
    match error:
        case Refused():
            return error
        case InvalidTask(code="not_json"):
            return Refused(400, error.code, error.message)
        case InvalidTask(code="task_too_large"):
            return Refused(413, error.code, error.message)
        case InvalidTask():
            return Refused(422, error.code, error.message, errors=_faults(error))
        case Outage() | InferqError(code="unroutable"):
            # Its message names hosts of ours, which are the operator's business, not the tenant's.
            _log.warning("%s: %s", error.code, error.message)
            seconds = max(1, math.ceil(getattr(error, "retry_after", _RETRY_AFTER)))
            what = _OUTAGES.get(error.code, "a service behind the gateway is away")
            return Refused(
                503, error.code, f"{what}; try again in {seconds} s", headers={"Retry-After": str(seconds)}
            )
        case InferqError(code="object_not_found"):
            return Refused(404, "not_found", "the object does not exist")
        case _:
            _log.error("unexpected: %s: %s", error.code, error.message, exc_info=error)
            return _internal()


def document(refused: Refused) -> Response:
    """The refusal as an HTTP answer."""
    problem = {
        "type": f"urn:inferq:problem:{refused.code}",
        "title": _title(refused.status),
        "status": refused.status,
        "detail": refused.message[:_DETAIL_LIMIT],
        "code": refused.code,
        **refused.about,
    }
    if refused.errors is not None:
        problem["errors"] = [fault.model_dump() for fault in refused.errors[:_ERRORS_LIMIT]]
    # A message may echo a lone surrogate out of the request, which only \u escapes can carry.
    body = json.dumps(problem, ensure_ascii=True).encode()
    return Response(body, refused.status, refused.headers, MEDIA_TYPE)


def _title(status: int) -> str:
    try:
        return http.HTTPStatus(status).phrase
    except ValueError:
        return "Error"


def _faults(error: InvalidTask) -> tuple[Fault, ...] | None:
    if not isinstance(error.__cause__, ValidationError):
        return None
    lines = [line.partition(": ") for line in describe_faults(error.__cause__)]
    return tuple(Fault(field=field, detail=detail) for field, _, detail in lines)


def _internal() -> Refused:
    return Refused(500, "internal", "something unexpected went wrong in the gateway; its log says what")


async def _answer_ours(_request: Request, error: Exception) -> Response:
    return document(refusal_of(cast(InferqError, error)))


async def _answer_http(request: Request, error: Exception) -> Response:
    error = cast(HTTPException, error)
    code = _title(error.status_code).lower().replace(" ", "_").replace("-", "_")
    details = {
        404: f"there is nothing at {request.url.path}",
        405: f"{request.method} is not something that {request.url.path} does",
    }
    detail = details.get(error.status_code, str(error.detail))
    return document(Refused(error.status_code, code, detail, headers=error.headers))


async def _answer_invalid_request(_request: Request, error: Exception) -> Response:
    error = cast(RequestValidationError, error)
    faults = tuple(
        Fault(field=".".join(str(part) for part in fault["loc"][1:]), detail=fault["msg"])
        for fault in error.errors()
    )
    message = "; ".join(f"{fault.field}: {fault.detail}" for fault in faults)
    return document(Refused(422, "invalid_request", message, errors=faults))


async def _answer_nobody(request: Request, _error: Exception) -> Response:
    _log.info("%s %s: the client left before its request was complete", request.method, request.url.path)
    return document(Refused(400, "client_left", "the request ended before it was complete"))


async def _answer_unexpected(_request: Request, _error: Exception) -> Response:
    return document(_internal())
