"""Why a task can fail, in three classes that say what happens next.

InferqError
├── InvalidTask        the task will never work: no retry
├── TransientFailure   another attempt may work: retried through the levels
└── Outage             a service of ours is away: wait for it, burn no attempt
"""

from __future__ import annotations


class InferqError(Exception):
    """The root of every error that inferq raises on purpose.

    `code` is the stable, machine-readable name that travels in results, events and problem documents.
    """

    code = "error"

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        if code is not None:
            self.code = code

    @property
    def message(self) -> str:
        return str(self)


class InvalidTask(InferqError):
    """The task or one of its inputs is wrong and stays wrong however often it is tried."""

    code = "invalid_task"


class TransientFailure(InferqError):
    """This attempt failed for a reason that another attempt may not meet."""

    code = "transient_failure"


class Outage(InferqError):
    """A service that inferq itself depends on cannot be reached at the moment."""

    code = "outage"


class InstallationError(InferqError):
    """What is installed or configured on this machine cannot work; the message says what to change."""

    code = "installation"
