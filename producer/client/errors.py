"""The errors that the clients raise.

ApiError               any other error answer
├── InvalidRequest     400, 413, 422
├── Unauthorized       401, 403
├── NotFound           404
├── Conflict           409
│   └── NotEnded       409 with the code `not_ended`, or a timeout of the client's `wait`
└── Unavailable        429, 502, 503, 504, or no answer
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from inferq.schemas import InferqError

__all__ = ["ApiError", "Conflict", "InvalidRequest", "NotEnded", "NotFound", "Unauthorized", "Unavailable"]


class ApiError(InferqError):
    """The gateway answered with an error.

    Attributes:
        code: The stable, machine-readable name of the error, such as `id_conflict`.
        status: The HTTP status; None if there was no answer.
        title: The error in a few words.
        detail: What happened, to what, and what to do.
        errors: For a request with wrong fields, one mapping per field, with the keys `field` and `detail`.
    """

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
    """The request is wrong and cannot succeed; `errors` names the wrong fields."""


class Unauthorized(ApiError):
    """The API key is missing or unknown, or belongs to another tenant."""


class NotFound(ApiError):
    """There is no such task, batch, callback, artifact or file."""


class Conflict(ApiError):
    """The id belongs to a task or batch with other content, or its state does not allow the call."""


class NotEnded(Conflict):
    """The task or batch has not ended yet."""


class Unavailable(ApiError):
    """The gateway is unreachable, or cannot answer now. Every retry failed too."""
