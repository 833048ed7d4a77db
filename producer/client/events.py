"""The event stream of a task, over one connection after the other."""

from __future__ import annotations

from typing import Any

import httpx

from inferq.producer.client.requests import (
    MIN_POLL_SECONDS,
    Request,
    error_of,
    is_retriable,
    retry_delay,
)
from inferq.schemas import END_STATES, Event
from inferq.schemas.paths import task_path

_READ_SECONDS = 60.0
"""The gateway sends a comment more often than this when there is no event."""


class EventStream:
    """Reads a task's server-sent events and decides when to connect again. The client does the network calls.

    `ended` is True after the task's last event. `pause` is the seconds to wait before the next connection.
    """

    def __init__(self, task_id: str, retries: int) -> None:
        self.ended = False
        self.pause = 0.0
        self._path = f"{task_path(task_id)}/events"
        self._retries = retries
        self._failures = 0
        self._last: Event | None = None
        self._line = b""

    def connect(self, timeout: float) -> dict[str, Any]:
        """Start a new connection: gives the arguments of httpx's `stream`. `timeout` is in seconds."""
        self._line = b""
        self.pause = MIN_POLL_SECONDS
        headers = {"Accept": "text/event-stream"}
        return Request("GET", self._path, headers=headers, extra_timeout=_READ_SECONDS).arguments(timeout)

    def feed(self, chunk: bytes) -> list[Event]:
        """The new events that this chunk of the stream completes."""
        # The gateway ends lines with LF. httpx's own line reader also splits at U+2028, which JSON may contain.
        *lines, self._line = (self._line + chunk).split(b"\n")
        found = []
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            event = Event.model_validate_json(line[5:].strip())
            self._failures = 0
            # A new connection starts with the task's present state, which may be the last event's.
            if self._last is None or event.data != self._last.data:
                found.append(event)
            self._last = event
            self.ended = event.data.state in END_STATES
        return found

    def failed(self, reply: httpx.Response | httpx.TransportError) -> None:
        """Note that the connection was refused or lost. Raises an ApiError if no retry is left or useful."""
        if not is_retriable(reply) or self._failures >= self._retries:
            raise error_of(reply) from (reply if isinstance(reply, httpx.TransportError) else None)
        self.pause = retry_delay(reply, self._failures)
        self._failures += 1
