"""inferq: a distributed task queue for AI inference on RabbitMQ.

    from inferq import Client

    with Client() as client:
        task = client.submit("ner", text="张伟在北京大学工作。")
        print(client.result(task.task_id, wait=30).output)

`AsyncClient` has the same methods for asyncio and trio. `inferq.engine` is for task types of your own, and
`inferq.testing` for their tests.

Every error that inferq raises on purpose derives from InferqError:

InferqError
├── InvalidTask            the task cannot succeed; it is not retried
├── TransientFailure       this attempt failed; the task is retried
├── Outage                 a service that inferq depends on is unavailable
├── InstallationError      the packages or settings of this machine are wrong
└── ApiError               the gateway answered with an error
    ├── InvalidRequest     the request is wrong; `errors` names the fields
    ├── Unauthorized       the API key is missing or unknown, or belongs to another tenant
    ├── NotFound           there is no such task, batch, callback, artifact or file
    ├── Conflict           the id belongs to other content, or the task's state does not allow the call
    │   └── NotEnded       the task or batch has not ended yet
    └── Unavailable        the gateway is unreachable, or cannot answer now
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inferq.producer.client.async_client import AsyncClient
    from inferq.producer.client.errors import (
        ApiError,
        Conflict,
        InvalidRequest,
        NotEnded,
        NotFound,
        Unauthorized,
        Unavailable,
    )
    from inferq.producer.client.sync_client import Client
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
    "inferq.producer.client.async_client": ("AsyncClient",),
    "inferq.producer.client.sync_client": ("Client",),
    "inferq.producer.client.errors": (
        "ApiError",
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
