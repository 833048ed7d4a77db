"""Errors as problem documents (RFC 9457): which exception gives which status and text, in one place."""

from __future__ import annotations

import http
import json
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from inferq.producer.gateway.routing import methods_of_path
from inferq.schemas import InferqError, InvalidTask, Outage, describe_faults

MEDIA_TYPE = "application/problem+json"

_DETAIL_LIMIT = 4000
_ERRORS_LIMIT = 50
_RETRY_AFTER = 5.0
_OUTAGES = {
    "broker_unavailable": "the message broker is unavailable and the request was not accepted",
    "publish_rejected": "the queue is full and the request was not accepted",
    "unroutable": "no queue for tasks of this type exists yet",
    "status_unavailable": "the status index (Redis) is unavailable",
    "store_unavailable": "the object store is unavailable",
}

_log = logging.getLogger(__name__)


class Fault(BaseModel):
    """What is wrong with one field of a request."""

    model_config = ConfigDict(frozen=True)

    field: str
    detail: str


class Problem(BaseModel):
    """An error. `code` is its stable name; `errors` lists the fields that are wrong, if any.

    `task_id` or `batch_id`, and `state`, identify the task or batch concerned.
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


class ProblemError(InferqError):
    """The gateway answers the request with a problem document.

    `extensions` are further members of the document, such as `task_id`.
    """

    code = "refused"

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        headers: Mapping[str, str] | None = None,
        extensions: Mapping[str, Any] | None = None,
        errors: tuple[Fault, ...] | None = None,
    ) -> None:
        super().__init__(message, code=code)
        self.status = status
        self.headers = dict(headers or {})
        self.extensions = dict(extensions or {})
        self.errors = errors


def not_found(name: str) -> ProblemError:
    """The problem (404) of something that does not exist; `name` names it."""
    return ProblemError(404, "not_found", f"{name} does not exist")


def unknown_file(field: str, url: str) -> ProblemError:
    """The problem (422) of a field that names an upload which does not exist."""
    detail = f"the uploaded file {url!r} does not exist; upload it first (POST /v1/files)"
    return invalid("unknown_file", Fault(field=field, detail=detail))


def invalid(code: str, *faults: Fault) -> ProblemError:
    """The problem (422) of fields that are wrong."""
    message = "; ".join(f"{fault.field}: {fault.detail}" for fault in faults)
    return ProblemError(422, code, message, errors=faults)


def faults_of(error: ValidationError) -> tuple[Fault, ...]:
    """What is wrong with each field, in plain words."""
    lines = [line.partition(": ") for line in describe_faults(error)]
    return tuple(Fault(field=field, detail=detail) for field, _, detail in lines)


def register(app: FastAPI, routes: Sequence[BaseRoute]) -> None:
    """Make `app`, which has these routes, answer every error with a problem document."""
    app.state.routes = routes
    app.add_exception_handler(InferqError, _answer_inferq_error)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(RequestValidationError, _answer_invalid_request)
    app.add_exception_handler(ClientDisconnect, _answer_disconnect)
    app.add_exception_handler(Exception, _answer_unexpected)


def problem_of(error: InferqError) -> ProblemError:
    """The problem that the gateway answers an error with."""
    match error:
        case ProblemError():
            return error
        case InvalidTask(code="not_json"):
            return ProblemError(400, error.code, error.message)
        case InvalidTask(code="task_too_large"):
            return ProblemError(413, error.code, error.message)
        case InvalidTask():
            cause = error.__cause__
            errors = faults_of(cause) if isinstance(cause, ValidationError) else None
            return ProblemError(422, error.code, error.message, errors=errors)
        case Outage() | InferqError(code="unroutable"):
            # The message names internal hosts: it goes to the operator's log, not to the tenant.
            _log.warning("%s: %s", error.code, error.message)
            seconds = max(1, math.ceil(getattr(error, "retry_after", _RETRY_AFTER)))
            what = _OUTAGES.get(error.code, "a service that the gateway needs is unavailable")
            return ProblemError(
                503, error.code, f"{what}; try again in {seconds} s", headers={"Retry-After": str(seconds)}
            )
        case InferqError(code="object_not_found"):
            return ProblemError(404, "not_found", "the file does not exist")
        case _:
            _log.error("unexpected error: %s: %s", error.code, error.message, exc_info=error)
            return _internal()


def _response(problem: ProblemError) -> Response:
    document = {
        "type": f"urn:inferq:problem:{problem.code}",
        "title": _title(problem.status),
        "status": problem.status,
        "detail": problem.message[:_DETAIL_LIMIT],
        "code": problem.code,
        **problem.extensions,
    }
    if problem.errors is not None:
        document["errors"] = [fault.model_dump() for fault in problem.errors[:_ERRORS_LIMIT]]
    # A message may repeat a lone surrogate from the request, which JSON can carry only as a \u escape.
    body = json.dumps(document, ensure_ascii=True).encode()
    return Response(body, problem.status, problem.headers, MEDIA_TYPE)


def _title(status: int) -> str:
    try:
        return http.HTTPStatus(status).phrase
    except ValueError:
        return "Error"


def _internal() -> ProblemError:
    return ProblemError(500, "internal", "the gateway failed unexpectedly; see its log")


async def _answer_inferq_error(_request: Request, error: Exception) -> Response:
    return _response(problem_of(cast(InferqError, error)))


async def _answer_http(request: Request, error: Exception) -> Response:
    error = cast(HTTPException, error)
    code = _title(error.status_code).lower().replace(" ", "_").replace("-", "_")
    details = {
        404: f"{request.url.path} does not exist",
        405: f"{request.url.path} does not support {request.method}",
    }
    detail = details.get(error.status_code, str(error.detail))
    headers = dict(error.headers or {})
    if error.status_code == 405 and (methods := methods_of_path(request.app.state.routes, request.scope)):
        headers["Allow"] = ", ".join(sorted(methods))  # the framework names those of one route
    return _response(ProblemError(error.status_code, code, detail, headers=headers))


async def _answer_invalid_request(_request: Request, error: Exception) -> Response:
    error = cast(RequestValidationError, error)
    faults = (
        Fault(field=".".join(str(part) for part in fault["loc"][1:]), detail=fault["msg"])
        for fault in error.errors()
    )
    return _response(invalid("invalid_request", *faults))


async def _answer_disconnect(request: Request, _error: Exception) -> Response:
    _log.info(
        "%s %s: the client disconnected before its request was complete", request.method, request.url.path
    )
    return _response(
        ProblemError(400, "client_left", "the client disconnected before the request was complete")
    )


async def _answer_unexpected(_request: Request, _error: Exception) -> Response:
    return _response(_internal())
