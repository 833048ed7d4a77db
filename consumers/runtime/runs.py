"""What a run of an engine process calls while it lasts, and the ways in which it ends without an answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from inferq.consumers.runtime.messages import Alone, Done, Failed
from inferq.schemas import TransientFailure

AbortReason = Literal["cancelled", "shutdown", "urgent"]
"""`urgent`: a more urgent task waits, so that those of a group whose batch has not begun are to give way."""

LOOK_SECONDS = 0.25
"""How often a run, a download or a wait checks whether it is cancelled, over time, or shutting down."""

SEND_SECONDS = 5.0
"""How long an engine process may take to make room for a message, and to answer one between two runs."""


class EngineDied(TransientFailure):
    """The engine process ended during a run: it crashed, or the system killed it for its memory."""

    code = "engine_died"


class OverTime(TransientFailure):
    """The run was stopped at its time limit."""

    code = "time_limit"

    def __init__(self, time_limit: float) -> None:
        super().__init__(
            f"the run was stopped at its time limit of {time_limit:g} s; submit a smaller task, "
            "or one with a larger time_limit (at most the worker's INFERQ_MAX_TIME_LIMIT)"
        )


class RunAborted(Exception):
    """The run was stopped on request. `reason` distinguishes a user's cancel from a shutdown."""

    def __init__(self, reason: AbortReason) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class RunHooks:
    """Called during a run, a few times a second, from the run's thread.

    `progress` gets the fraction done and a note. `abort` says why the run has to stop, if it has to.
    """

    progress: Callable[[float, str], None]
    abort: Callable[[], AbortReason | None]


@dataclass(frozen=True)
class BatchHooks:
    """Called while a group of jobs is computed, from the run's thread. A job is named by its place in the group.

    `progress` gets the place, the fraction done and a note. `aborts`, called a few times a second, names the jobs that
    have to stop; a shutdown of one stops all, and an urgent task none whose batch has begun. `ended` is called once
    for each job, as soon as its end is known.
    """

    progress: Callable[[int, float, str], None]
    aborts: Callable[[], Mapping[int, AbortReason]]
    ended: Callable[[int, Done | Failed | RunAborted | Alone], None]
