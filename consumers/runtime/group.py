"""A group of jobs on its way through an engine process, as the worker sees it.

The engine process forms batches of the jobs, and computes one batch after the other.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import Literal

from inferq.consumers.runtime.channel import Channel
from inferq.consumers.runtime.messages import (
    Abort,
    Aborted,
    Alone,
    BatchBegun,
    Done,
    Failed,
    Job,
    Progress,
    from_engine,
    send,
)
from inferq.consumers.runtime.runs import (
    LOOK_SECONDS,
    SEND_SECONDS,
    AbortReason,
    BatchHooks,
    EngineDied,
    OverTime,
    RunAborted,
)

Fault = Literal["engine_died", "time_limit", "out_of_memory"]


class GroupRun:
    """Follows the jobs of a group, and reports the end of each once.

    `answered`: how many jobs the engine has computed. `out_of_memory`: whether memory ran out for one of them.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        watch: BatchHooks,
        abort_grace: float,
        *,
        look: Callable[[], None],
        begin: Callable[[float], None],
    ) -> None:
        """`look`, called a few times a second, raises if the engine process is to be given up.

        `begin` is called when a batch begins, with the seconds until it is overdue.
        """
        self._jobs = jobs
        self._watch = watch
        self._abort_grace = abort_grace
        self._look = look
        self._begin = begin
        self._open = set(range(len(jobs)))  # not reported
        self._unanswered = set(self._open)  # by the engine process
        self._batch: frozenset[int] = frozenset()
        self._shutting_down = False
        self._limit = self._began = 0.0
        self._deadline = self._kill_at = math.inf
        self.answered = 0
        self.out_of_memory = False

    def follow(self, pipe: Channel) -> bool:
        """Follow the group to its end. False if the engine process does not stop a batch that it should stop.

        Raises EngineDied, EOFError, OSError, Unreadable, and what the hooks and `look` raise.
        """
        self._start(self._open)
        next_look = time.monotonic() + LOOK_SECONDS
        while self._unanswered:
            if pipe.poll(min(next_look, self._deadline, self._kill_at) - time.monotonic()):
                match from_engine(pipe):
                    case BatchBegun(places=places):
                        self._batch = frozenset(places)
                        self._start(self._batch)
                    case Progress(place=place, fraction=fraction, note=note):
                        if place in self._open:
                            self._watch.progress(place, fraction, note)
                    case Done() | Failed() | Aborted() | Alone() as answer:
                        self._take(answer)
                    case unexpected:
                        raise EngineDied(f"the engine process said {unexpected.kind!r} during a run")
            now = time.monotonic()
            if next_look <= now < self._deadline:
                self._look()
                self._abort(pipe, self._watch.aborts())
                next_look = now + LOOK_SECONDS
            if now >= self._deadline:
                self._deadline = math.inf
                self._ask_to_stop(pipe, self._computing)
                self._fail_batch("time_limit", str(OverTime(self._limit)))
            self._wait_for_unwanted()
            if now >= self._kill_at:
                return False
        return True

    def give_up(self, fault: Fault, message: str) -> None:
        """Report the end of all open jobs: the engine process is gone."""
        if self._batch:
            self._fail_batch(fault, message)
        for place in sorted(self._open):
            self._end(place, Alone(place=place, reason="engine_died", message=message))

    @property
    def _computing(self) -> frozenset[int]:
        """The jobs of the batch, or those of which a batch is to be formed."""
        return self._batch or frozenset(self._unanswered)

    def _start(self, places: Collection[int]) -> None:
        """Start the time of a batch of these jobs."""
        self._limit = min((self._jobs[place].time_limit for place in places), default=SEND_SECONDS)
        self._began = time.monotonic()
        self._deadline = self._began + self._limit
        self._begin(self._limit + self._abort_grace)

    def _take(self, answer: Done | Failed | Aborted | Alone) -> None:
        place = answer.place
        self._unanswered.discard(place)
        if not self._batch & self._unanswered:
            self._batch = frozenset()
            self._start(self._unanswered)
        if not isinstance(answer, Aborted):
            self.answered += 1
        if isinstance(answer, Failed):
            self.out_of_memory |= answer.out_of_memory
        elif isinstance(answer, Alone):
            self.out_of_memory |= answer.reason == "out_of_memory"
        if not isinstance(answer, Aborted):
            self._end(place, answer)
        elif self._shutting_down:
            self._end(place, RunAborted("shutdown"))
        else:  # one that was asked to stop has been reported
            message = "the engine stopped without being asked"
            self._end(
                place, Failed(place=place, code="engine_error", message=message, invalid=False, seconds=0)
            )

    def _abort(self, pipe: Channel, reasons: Mapping[int, AbortReason]) -> None:
        asked = {
            place: reason
            for place, reason in reasons.items()
            if place in self._open and not (reason == "urgent" and place in self._computing)
        }
        shutdown = "shutdown" in asked.values() and not self._shutting_down
        if asked:
            self._ask_to_stop(pipe, self._unanswered if shutdown else asked)
        for place, reason in asked.items():
            if reason != "shutdown":
                self._end(place, RunAborted(reason))
        if shutdown:
            self._shutting_down = True
            self._kill_at = time.monotonic() + self._abort_grace
            for place in sorted(self._open - self._batch):
                self._end(place, RunAborted("shutdown"))

    def _ask_to_stop(self, pipe: Channel, places: Collection[int]) -> None:
        with suppress(OSError):  # it has ended already
            send(pipe, Abort(places=tuple(places)), SEND_SECONDS)

    def _wait_for_unwanted(self) -> None:
        """Limit the time for a batch of which no job is wanted: it does not have to be computed to its end."""
        if self._shutting_down:
            return
        if self._open & self._computing:
            self._kill_at = math.inf
        elif self._kill_at == math.inf:
            self._kill_at = time.monotonic() + (self._abort_grace if self._batch else SEND_SECONDS)

    def _fail_batch(self, fault: Fault, message: str) -> None:
        """Report the end of the batch's jobs. One that was alone has failed, unless the engine is to blame."""
        fails = len(self._batch) == 1 and fault != "engine_died" and not self._shutting_down
        for place in sorted(self._open & self._computing):
            if not fails:
                self._end(place, Alone(place=place, reason=fault, message=message))
            else:
                self._end(
                    place,
                    Failed(
                        place=place,
                        code=fault,
                        message=message,
                        invalid=False,
                        out_of_memory=fault == "out_of_memory",
                        seconds=time.monotonic() - self._began,
                    ),
                )

    def _end(self, place: int, ending: Done | Failed | RunAborted | Alone) -> None:
        if place not in self._open:
            return
        self._open.discard(place)
        if self._shutting_down and isinstance(ending, Alone):
            ending = RunAborted("shutdown")
        self._watch.ended(place, ending)
