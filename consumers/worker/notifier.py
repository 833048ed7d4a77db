"""The callbacks of a task, handed over to the queue that delivers them.

The end of a task is reported in this order: dead letter, record, status, callback, ack. A crash in between repeats the
later steps with the same `webhook-id`, which is made from the record that is kept.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from pydantic import TypeAdapter, ValidationError

from inferq.broker import Message, Publisher, callback_message
from inferq.broker.spans import sending_job
from inferq.schemas import (
    Callback,
    CallbackEvent,
    CallbackUrl,
    Event,
    EventData,
    Outage,
    Result,
    Task,
    end_callback,
    task_callback,
)
from inferq.schemas.trace_context import TraceContext

_log = logging.getLogger(__name__)

PROGRESS_SECONDS = 3.0
"""The shortest time between two callbacks of a run's progress."""

_MOST_NOTES = 500
_PATIENCE_SECONDS = 5.0
_URL: TypeAdapter[str] = TypeAdapter(CallbackUrl)


class Notifier:
    """Sends the callbacks of one delivery; nothing if the task names no URL.

    `publish` sends a message and waits for its confirm, however long that takes.
    """

    def __init__(
        self,
        publisher: Publisher,
        publish: Callable[[Message], None],
        *,
        url: str | None,
        events: tuple[CallbackEvent, ...] = ("completed",),
        trace: TraceContext | None = None,
    ) -> None:
        self._publisher = publisher
        self._publish = publish
        self._url = url
        self._events = events
        self._trace = trace
        self._trace_id = trace.trace_id if trace is not None else None
        self._unconfirmed: list[tuple[Message, Future[None]]] = []
        self._next_progress = 0.0
        self._reported_percent = 0

    def started(self, task: Task, *, attempt: int, redrives: int, at: datetime) -> None:
        """Report that a run begins, without waiting; `settle` makes sure that the broker has the message."""
        if self._url is None or "started" not in self._events:
            return
        data = EventData.of(
            task, "running",
            attempt=attempt, redrives=redrives, metadata=task.metadata, trace_id=self._trace_id,
        )  # fmt: skip
        event = Event(type="task.started", timestamp=at, data=data)
        with self._sending(task_callback(event, self._url, redrives, attempt)) as message:
            self._unconfirmed.append((message, self._publish_pipelined(message)))

    def progress(
        self, task: Task, fraction: float, note: str, *, attempt: int, redrives: int, at: datetime
    ) -> None:
        """Report progress: once per percent, at most once in PROGRESS_SECONDS; skipped without a broker."""
        if self._url is None or "progress" not in self._events:
            return
        percent = int(min(max(fraction, 0.0), 1.0) * 100) if fraction == fraction else 0
        if percent <= self._reported_percent or time.monotonic() < self._next_progress:
            return
        self._reported_percent = percent
        self._next_progress = time.monotonic() + PROGRESS_SECONDS
        data = EventData.of(
            task,
            "running",
            attempt=attempt,
            redrives=redrives,
            progress=percent / 100,
            note=note[:_MOST_NOTES],
            metadata=task.metadata,
            trace_id=self._trace_id,
        )
        event = Event(type="task.progress", timestamp=at, data=data)
        with self._sending(task_callback(event, self._url, redrives, attempt, percent)) as message:
            self._publish_pipelined(message)

    def ended(self, kept: Result, output: bytes | None = None, *, wait: bool = True) -> None:
        """Report how the task ended, by the record that is kept; returns once the broker has the message.

        `output` is the output as JSON text, if the record leaves it out. Without `wait`, `settle` waits.
        """
        self.settle()
        if self._url is not None and "completed" in self._events:
            with self._sending(end_callback(kept, self._url, output)) as message:
                if wait:
                    self._publish(message)
                else:
                    self._unconfirmed.append((message, self._publish_pipelined(message)))

    def settle(self) -> None:
        """Make sure that the broker has what was sent without waiting."""
        unconfirmed, self._unconfirmed = self._unconfirmed, []
        for message, confirmed in unconfirmed:
            try:
                confirmed.result()
            except Outage:
                self._publish(message)

    @contextmanager
    def _sending(self, callback: Callback) -> Iterator[Message]:
        """The callback's message, in the span that publishes it."""
        with sending_job("inference.callbacks", callback.callback_id) as span:
            span.set("inferq.event", callback.event)
            yield callback_message(callback, trace=span.context or self._trace)

    def _publish_pipelined(self, message: Message) -> Future[None]:
        try:
            return self._publisher.publish(message, timeout=_PATIENCE_SECONDS)
        except Outage as error:
            failed: Future[None] = Future()
            failed.set_exception(error)
            return failed


def legible_url(body: bytes) -> str | None:
    """The callback URL of a message that is no task; None if it names none legibly."""
    try:
        broken: Any = json.loads(body)
        url = broken.get("callback_url")
        return None if url is None else _URL.validate_python(url)
    except (ValueError, AttributeError, RecursionError, ValidationError):
        return None
