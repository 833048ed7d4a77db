"""inferq: a RabbitMQ-backed distributed task queue for AI inference.

    from inferq import Client

    with Client() as client:
        task = client.submit("ner", text="张伟在北京大学工作。")
        print(client.result(task.task_id).output)

Errors, all of which derive from InferqError:

InferqError
├── InvalidTask            the task can never work: it is not retried
├── TransientFailure       another attempt may work: it is retried
├── Outage                 a service that inferq depends on is unavailable
├── InstallationError      this machine's packages or settings cannot work
└── ApiError               the gateway's answer is an error
    ├── InvalidRequest     the request is wrong; `errors` names the fields
    ├── Unauthorized       the API key is unknown, or belongs to another tenant
    ├── NotFound           no such task, batch, artifact or file
    ├── Conflict           the id belongs to a task with other content, or the task has ended
    │   └── NotEnded       the task has not ended yet
    └── Unavailable        the gateway cannot be reached, or cannot answer now

`inferq.engine` is for task types of your own, `inferq.testing` for their tests.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inferq.producer.client import (
        ApiError,
        AsyncClient,
        Client,
        Conflict,
        InvalidRequest,
        NotEnded,
        NotFound,
        Unauthorized,
        Unavailable,
    )
    from inferq.schemas import InferqError, InstallationError, InvalidTask, Outage, TransientFailure

__all__ = [
    "ApiError",
    "AsyncClient",
    "Client",
    "Conflict",
    "InferqError",
    "InstallationError",
    "InvalidRequest",
    "InvalidTask",
    "NotEnded",
    "NotFound",
    "Outage",
    "TransientFailure",
    "Unauthorized",
    "Unavailable",
]

# Loaded on first use: every part of inferq imports this package, and most need no HTTP client.
_MODULES = {
    "inferq.producer.client": (
        "ApiError",
        "AsyncClient",
        "Client",
        "Conflict",
        "InvalidRequest",
        "NotEnded",
        "NotFound",
        "Unauthorized",
        "Unavailable",
    ),
    "inferq.schemas": ("InferqError", "InstallationError", "InvalidTask", "Outage", "TransientFailure"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
