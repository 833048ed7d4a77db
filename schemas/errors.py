"""The errors of inferq. Three classes of task failure decide what happens next.

InferqError
├── InvalidTask        the task can never succeed: no retry
├── TransientFailure   another attempt may succeed: retried through the retry levels
└── Outage             a service is unavailable: wait for it, use up no attempt
"""

from __future__ import annotations

import logging
import secrets

EXIT_CONFIG = 78
"""The exit status of a command that a restart does not help: `EX_CONFIG` of sysexits.h.

A package is missing, or a setting is wrong.
"""
_UNTIL_SOMEBODY_ACTS = frozenset(
    {
        "bad_settings",
        "bad_store_url",
        "engine_not_installed",
        "jobs_not_installed",
        "otel_not_installed",
        "unknown_task_type",
    }
)


class InferqError(Exception):
    """The root of all errors that inferq raises.

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
    """The task or one of its inputs is invalid, and no retry changes that."""

    code = "invalid_task"


class TransientFailure(InferqError):
    """This attempt failed, and another one may succeed."""

    code = "transient_failure"


class Outage(InferqError):
    """A service that inferq depends on is unavailable."""

    code = "outage"


class InstallationError(InferqError):
    """What is installed or configured on this machine cannot work; the message says what to change."""

    code = "installation"

    @property
    def exit_status(self) -> int:
        """The status of a command that this error ends: EXIT_CONFIG if a restart does not help, else 1."""
        return EXIT_CONFIG if self.code in _UNTIL_SOMEBODY_ACTS else 1


def report_incident(log: logging.Logger, what: str, error: BaseException) -> str:
    """Log an unforeseen error under a new incident number. Returns its class and the number, for the task's owner.

    The text of such an error may hold paths, addresses and credentials, so only the log has it.
    """
    number = secrets.token_hex(4)
    log.error("incident %s: %s", number, what, exc_info=error)
    return f"{type(error).__name__} (incident {number}); an operator finds the cause in the log under this number"
