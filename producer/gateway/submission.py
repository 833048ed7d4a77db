"""Submitting a task: gather the facts, decide by `admission`, publish, confirm.

The calls of a submission, step by step; the calls of one step run at the same time:

1. Redis: reserve the id. If the id has the record of an accepted task, the other steps are skipped.
2. The object store: whether each uploaded input exists. If the client chose the id, also whether a task of
   that id ended before, and whether the id belongs to a queued line of a batch (Redis).
3. The broker: publish, and wait for the confirm.
4. Redis: confirm the record.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from contextvars import Context
from dataclasses import replace
from datetime import UTC, datetime
from typing import TypeVar

from inferq.broker.messages import task_message
from inferq.broker.spans import sending, traced
from inferq.producer.gateway.admission import (
    Facts,
    Publish,
    Refuse,
    UnusableInput,
    admit,
    id_conflict,
    may_be_in_use,
)
from inferq.producer.gateway.problems import problem_of
from inferq.producer.gateway.services import Services
from inferq.producer.gateway.task_lookup import queued_line
from inferq.schemas import InferqError, InvalidTask, Outage, Result, Task, TaskStatus
from inferq.schemas.trace_context import TraceContext
from inferq.storage.objects.results import upload_key
from inferq.storage.objects.store import ObjectNotFound
from inferq.storage.status.index import StatusOutage, Submission

T = TypeVar("T")

_RETRY_SECONDS = 1.0
_MAX_UNRECORDED = 10_000
"""How many tasks are kept until Redis is back; the workers record the rest."""

_log = logging.getLogger(__name__)


class Submitter:
    """Submits tasks. A submission runs to its end even if its client disconnects.

    Submissions of one id at the same time are one submission.
    """

    def __init__(self, services: Services) -> None:
        self._services = services
        self._in_flight: dict[tuple[str, str], tuple[str, asyncio.Task[TaskStatus]]] = {}
        self._recording: asyncio.Task[None] | None = None

    async def submit(self, task: Task, *, own_id: bool, trace: TraceContext | None = None) -> TaskStatus:
        """The task's status once the broker has confirmed it; `own_id`: whether the client chose the id.

        `trace`: the span of the request, or its client's.

        Raises ProblemError: 409 if the id belongs to another task, 422 if an uploaded input does not exist,
        503 if the broker did not confirm.
        """
        key = (task.tenant, task.task_id)
        digest = task.digest()
        while (found := self._in_flight.get(key)) is not None:
            if found[0] == digest:
                return await asyncio.shield(found[1])
            await asyncio.wait([found[1]])
        running = asyncio.create_task(self._submit(task, digest, own_id, trace))
        self._in_flight[key] = digest, running
        running.add_done_callback(lambda _: self._in_flight.pop(key))
        running.add_done_callback(_retrieve_exception)
        return await asyncio.shield(running)

    async def finish(self) -> None:
        """Wait for the submissions in flight; each has its own time limit."""
        if self._in_flight:
            await asyncio.wait([running for _, running in self._in_flight.values()])
        if self._recording is not None:
            self._recording.cancel()

    async def _submit(self, task: Task, digest: str, own_id: bool, trace: TraceContext | None) -> TaskStatus:
        facts = await self._gather(task, digest, own_id, trace)
        decision = admit(facts)
        if isinstance(decision, Publish):
            await self._publish(task, digest, trace)
            await self._confirm(task, digest, trace)
        elif not facts.record_decides:
            await self._withdraw(task, digest)
        if isinstance(decision, Refuse):
            raise decision.problem
        return decision.status

    async def _gather(self, task: Task, digest: str, own_id: bool, trace: TraceContext | None) -> Facts:
        _, accepted = self._services.unrecorded.get((task.tenant, task.task_id), (task, None))
        record = await self._reserve(task, digest, trace)
        facts = Facts(task, digest, record=record, accepted=accepted, trace_id=_id_of(trace))
        look_up = own_id and may_be_in_use(task.task_id, datetime.now(UTC))
        uploads = {field: url for field, url in task.inputs().items() if url.startswith("inferq:")}
        if facts.record_decides or not (look_up or uploads):
            return facts
        async with self._withdrawn_on_error(task, digest):
            result, is_queued_line, unusable_inputs = await asyncio.gather(
                self._find_result(task) if look_up else _value(None),
                self._is_queued_line(task) if look_up else _value(False),
                self._find_unusable_inputs(task, uploads),
            )
        return replace(facts, result=result, is_queued_line=is_queued_line, unusable_inputs=unusable_inputs)

    async def _reserve(self, task: Task, digest: str, trace: TraceContext | None) -> Submission | None:
        services = self._services
        try:
            await services.record_accepted(task.tenant, task.task_id)
            return await services.on_redis(services.status.submit, task, digest, trace_id=_id_of(trace))
        except StatusOutage:
            # Redis is an index: the task runs without it. `_confirm` says so if it ends up without a record.
            return None

    async def _find_result(self, task: Task) -> Result | None:
        try:
            return await self._services.try_store(self._services.results.load, task.tenant, task.task_id)
        except Outage as error:
            # The worker checks again before it runs anything.
            _log.warning("task %s: cannot check whether it ended before: %s", task.task_id, error)
            return None

    async def _is_queued_line(self, task: Task) -> bool:
        try:
            return await queued_line(self._services, task.tenant, task.task_id) is not None
        except Outage as error:
            # The worker checks again before it runs anything.
            _log.warning("task %s: cannot check whether it is a batch's line: %s", task.task_id, error)
            return False

    async def _find_unusable_inputs(
        self, task: Task, uploads: Mapping[str, str]
    ) -> tuple[UnusableInput, ...]:
        checks = (self._check_upload(task, field, url) for field, url in uploads.items())
        found = await asyncio.gather(*checks)
        return tuple(unusable for unusable in found if unusable is not None)

    async def _check_upload(self, task: Task, field: str, url: str) -> UnusableInput | None:
        try:
            key = upload_key(task.tenant, url.removeprefix("inferq:"))
            await self._services.try_store(self._services.store.stat, key)
        except (InvalidTask, ObjectNotFound) as error:
            return UnusableInput(field, url, error)
        except Outage as error:
            _log.warning("task %s: cannot check whether %s exists: %s", task.task_id, field, error)
        return None

    async def _publish(self, task: Task, digest: str, trace: TraceContext | None) -> None:
        metrics = self._services.metrics
        begun = time.perf_counter()
        message = task_message(task, digest=digest)
        async with self._withdrawn_on_error(task, digest):
            try:
                with sending(message) as span:
                    await self._services.publisher.confirm(
                        traced(message, span.context or trace),
                        timeout=self._services.settings.submit_timeout,
                    )
            except InferqError as error:
                problem = problem_of(error)
                # The client needs the id to submit the same task again; the broker may even have it.
                problem.extensions["task_id"] = task.task_id
                raise problem from error
        metrics.publish_seconds.observe(time.perf_counter() - begun)
        metrics.tasks_submitted.labels(task.task_type).inc()

    async def _confirm(self, task: Task, digest: str, trace: TraceContext | None) -> None:
        try:
            confirmed = await self._services.on_redis(
                self._services.status.confirm, task, digest, trace_id=_id_of(trace)
            )
        except StatusOutage as error:
            _log.warning("task %s: queued without a record, as Redis is unavailable: %s", task.task_id, error)
            self._record_later(task, digest)
        else:
            if not confirmed:
                raise id_conflict(task)

    @asynccontextmanager
    async def _withdrawn_on_error(self, task: Task, digest: str) -> AsyncIterator[None]:
        try:
            yield
        except Exception:
            await self._withdraw(task, digest)
            raise

    async def _withdraw(self, task: Task, digest: str) -> None:
        """Delete the record that `_reserve` made."""
        try:
            await self._services.on_redis(self._services.status.forget, task, digest)
        except StatusOutage as error:
            # The record stays unconfirmed, so the next submission of this id publishes.
            _log.warning("task %s: its unconfirmed record stays in Redis: %s", task.task_id, error)

    def _record_later(self, task: Task, digest: str) -> None:
        """Record the task once Redis is back: until a worker begins it, nobody else would."""
        unrecorded = self._services.unrecorded
        unrecorded[task.tenant, task.task_id] = task, digest
        if len(unrecorded) > _MAX_UNRECORDED:
            unrecorded.popitem(last=False)
        if self._recording is None or self._recording.done():
            self._recording = asyncio.create_task(self._record_all(), context=Context())

    async def _record_all(self) -> None:
        services = self._services
        while services.unrecorded:
            await asyncio.sleep(_RETRY_SECONDS)
            with suppress(StatusOutage):
                while services.unrecorded:
                    await services.record_accepted(*next(iter(services.unrecorded)))


def _id_of(trace: TraceContext | None) -> str | None:
    return trace.trace_id if trace is not None else None


async def _value(value: T) -> T:
    return value


def _retrieve_exception(running: asyncio.Task[TaskStatus]) -> None:
    # If every client has disconnected, nobody else retrieves it, and asyncio would log an error.
    if not running.cancelled():
        running.exception()
