"""The ledger: what each process saw, one line per fact, appended and never changed."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

Kind = Literal[
    "sent",  # a producer is about to publish the task
    "confirmed",  # the broker has confirmed it to the producer
    "start",  # an engine began to compute it; `what` is the worker's process id
    "result",  # a success stands in the object store; `what` says who saw it
    "attempts",  # its result took more than one; `what` says how many
    "failure",  # a failure or cancellation stands there; `what` is its code
    "event",  # the status index told of its end; `what` is the event's type
    "callback",  # its end was called back, signed; `run` is the webhook-id, `what` the event's type
    "dead",  # it lies among the dead letters; `what` is the reason
    "denied",  # the gateway refused the task, or said that it does not exist; `what` is the request and the answer
    "helper",  # the engine started a process; `what` is its id, `content` the id of the engine's process
    "fault",  # something was broken on purpose; `what` says what, `run` which time
    "mended",  # the fault of that `run` is over
]
_KINDS = frozenset(get_args(Kind))


@dataclass(frozen=True)
class Entry:
    """One line. `at` is Unix time in seconds; `run` names a run of the engine; `content` a record's text."""

    kind: Kind
    task: str
    at: float
    run: str = ""
    what: str = ""
    content: str = ""

    def __str__(self) -> str:
        more = " ".join(part for part in (self.what, self.run, self.content) if part)
        return f"{self.at:.3f} {self.kind:9} {self.task} {more}".rstrip()


class Ledger:
    """One file of entries; any number of processes and threads append to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # One write to a file opened for appending: lines of several processes never mix.
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def note(self, kind: Kind, task: str = "", *, run: str = "", what: str = "", content: str = "") -> None:
        entry = Entry(kind, task, time.time(), run, what, content)
        os.write(self._descriptor, json.dumps(asdict(entry)).encode() + b"\n")

    def read(self) -> list[Entry]:
        """All entries so far, in the order in which they were written. Raises ValueError for a bad line."""
        # The last line may still be on its way.
        lines = self.path.read_bytes().split(b"\n")[:-1]
        return [_entry(line) for line in lines]

    def confirmed(self) -> set[str]:
        """The tasks whose submission the broker has confirmed."""
        return {entry.task for entry in self.read() if entry.kind == "confirmed"}

    def close(self) -> None:
        os.close(self._descriptor)


def _entry(line: bytes) -> Entry:
    entry = Entry(**json.loads(line))
    if entry.kind not in _KINDS:
        raise ValueError(f"the ledger has an entry of unknown kind {entry.kind!r}")
    return entry
