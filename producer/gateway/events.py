"""Following a task to its end: event streams, and requests that wait."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

import anyio
from sse_starlette import EventSourceResponse, ServerSentEvent

from inferq.producer.gateway.auth import CurrentTenant
from inferq.producer.gateway.routing import Router
from inferq.producer.gateway.services import Services, ServicesDep
from inferq.producer.gateway.task_lookup import (
    checked_task_id,
    event_of_status,
    find_result,
    find_status,
    require_status,
)
from inferq.schemas import END_STATES, Event, Outage, State, TaskStatus
from inferq.storage.status.index import StatusIndex

_RECONNECT_MILLISECONDS = 2000
_RANK: dict[State, int] = {"queued": 0, "running": 1, "retrying": 2}

router = Router(prefix="/v1", tags=["tasks"])


@router.get(
    "/tasks/{task_id}/events",
    summary="Follow a task's events",
    response_class=EventSourceResponse,
    responses={
        200: {
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
            "description": "Server-sent events",
        }
    },
)
async def task_events(task_id: str, tenant: CurrentTenant, services: ServicesDep) -> EventSourceResponse:
    """Server-sent events; each has the event's type as its name and an Event as JSON data.

    The first event is the task's current status, the last one its end. After a lost connection, connect again.
    """
    await require_status(services, tenant, task_id)
    return EventSourceResponse(
        _stream(services, tenant, task_id), ping=services.settings.events_heartbeat, sep="\n"
    )


async def _stream(services: Services, tenant: str, task_id: str) -> AsyncGenerator[ServerSentEvent, None]:
    services.metrics.event_streams.inc()
    try:
        async with aclosing(follow(services, tenant, task_id)) as events:
            async for event in events:
                yield ServerSentEvent(
                    data=event.model_dump_json(), event=event.type, retry=_RECONNECT_MILLISECONDS, sep="\n"
                )
    finally:
        services.metrics.event_streams.dec()


async def wait_for_end(services: Services, tenant: str, task_id: str, seconds: float) -> TaskStatus | None:
    """The task's status once it has ended, or after `seconds`. Raises like `find_status`."""
    with anyio.move_on_after(seconds):
        async with aclosing(follow(services, tenant, task_id)) as events:
            async for _ in events:
                pass
    return await find_status(services, tenant, task_id)


async def follow(services: Services, tenant: str, task_id: str) -> AsyncGenerator[Event, None]:
    """The task's current status as an event, then its events until its end, or until the gateway stops.

    Subscribes before it polls, so that no event falls between the two. Events may be lost, so it polls again
    at every heartbeat, and asks the object store too.
    """
    checked_task_id(task_id)
    seen = EventFilter()
    channel = StatusIndex.channel(tenant, task_id)
    async with services.event_bus.subscribe(channel) as subscription:
        recheck = False
        while not services.closing.is_set():
            try:
                status = await find_status(services, tenant, task_id, recheck=recheck)
            except Outage:
                pass  # Redis and the object store are unavailable: poll again
            else:
                if status is None:
                    if seen.empty:
                        return
                    # Redis lost its records: a worker's next event, or the result, shows the state again.
                else:
                    if seen.is_news(status.state, status.attempt, status.progress, polled=True):
                        yield await _current(services, status)
                    if status.ended:
                        return
            recheck = True
            while event := await subscription.next(services.settings.events_heartbeat):
                data = event.data
                if seen.is_news(data.state, data.attempt, data.progress, polled=False):
                    yield event
                if data.state in END_STATES:
                    return


async def _current(services: Services, status: TaskStatus) -> Event:
    if status.ended:
        try:
            result = await find_result(services, status.tenant, status.task_id)
        except Outage:
            result = None
        if result is not None:
            return Event.of_result(result)
    return event_of_status(status)


@dataclass
class EventFilter:
    """Drops events that are older than what a reader has received."""

    mark: tuple[int, int, int] = (-1, 0, 0)
    progress: float | None = None
    polled: bool = False

    @property
    def empty(self) -> bool:
        """Whether the reader has received nothing."""
        return self.mark < (0, 0, 0)

    def is_news(self, state: State, attempt: int, progress: float | None, *, polled: bool) -> bool:
        """Whether this is news to the reader, and remember it if so. `polled`: from a poll, not an event."""
        mark = (1, 0, 0) if state in END_STATES else (0, attempt, _RANK[state])
        if mark < self.mark:
            return False
        if mark == self.mark:
            if progress is None or progress == self.progress:
                return False
            # An event that arrives just after a poll may be older than what the poll saw.
            if self.polled and not polled and self.progress is not None and progress < self.progress:
                return False
        self.mark, self.progress, self.polled = mark, progress, polled
        return True
