"""Following a task to its end, for event streams and for requests that wait."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

import anyio
from fastapi import APIRouter
from sse_starlette import EventSourceResponse, ServerSentEvent

from inferq.producer.gateway.auth import Tenant
from inferq.producer.gateway.lookup import (
    checked_id,
    event_of_status,
    find_result,
    find_status,
    require_status,
)
from inferq.producer.gateway.services import Here, Services
from inferq.schemas import END_STATES, Event, Outage, State, TaskStatus
from inferq.storage.status.index import StatusIndex

_RECONNECT_MILLISECONDS = 2000
_RANK: dict[State, int] = {"queued": 0, "running": 1, "retrying": 2}

router = APIRouter(prefix="/v1", tags=["tasks"])


@router.get(
    "/tasks/{task_id}/events",
    summary="Live progress",
    response_class=EventSourceResponse,
    responses={200: {"content": {"text/event-stream": {}}, "description": "Server-sent events"}},
)
async def task_events(task_id: str, tenant: Tenant, services: Here) -> EventSourceResponse:
    """Server-sent events, each named by its type and carrying an Event as JSON.

    The first tells where the task stands now, the last how it ended. A client that is cut off connects again.
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
    """Where the task stands once it has ended, or after `seconds`. Raises what `find_status` does."""
    with anyio.move_on_after(seconds):
        async with aclosing(follow(services, tenant, task_id)) as events:
            async for _ in events:
                pass
    return await find_status(services, tenant, task_id)


async def follow(services: Services, tenant: str, task_id: str) -> AsyncGenerator[Event, None]:
    """Where the task stands, then every event until its end; ends early when the gateway closes.

    It listens first and looks then, so that no end falls between the two. As what it hears may be lost on
    the way, it looks again at every heartbeat, in the object store too.
    """
    checked_id(task_id)
    shown = _Shown()
    channel = StatusIndex.channel(tenant, task_id)
    async with services.event_bus.subscribe(channel) as subscription:
        doubt = False
        while not services.closing.is_set():
            try:
                status = await find_status(services, tenant, task_id, doubt=doubt)
            except Outage:
                pass  # neither Redis nor the store can tell: ask again
            else:
                if status is None:
                    if shown.nothing:
                        return
                    # Redis was emptied: a worker, or the end in the store, will tell.
                else:
                    if shown.advances(status.state, status.attempt, status.progress, looked=True):
                        yield await _current(services, status)
                    if status.ended:
                        return
            doubt = True
            while event := await subscription.next(services.settings.events_heartbeat):
                data = event.data
                if shown.advances(data.state, data.attempt, data.progress, looked=False):
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
class _Shown:
    """What a reader has been told, so that what was overtaken on the way never takes it back."""

    mark: tuple[int, int, int] = (-1, 0, 0)
    progress: float | None = None
    looked: bool = False

    @property
    def nothing(self) -> bool:
        return self.mark < (0, 0, 0)

    def advances(self, state: State, attempt: int, progress: float | None, *, looked: bool) -> bool:
        """Whether this is news, and if so remember it; `looked` tells a look from an event heard."""
        mark = (1, 0, 0) if state in END_STATES else (0, attempt, _RANK[state])
        if mark < self.mark:
            return False
        if mark == self.mark:
            if progress is None or progress == self.progress:
                return False
            # Just after a look, what is heard may be older than what was seen.
            if self.looked and not looked and self.progress is not None and progress < self.progress:
                return False
        self.mark, self.progress, self.looked = mark, progress, looked
        return True
