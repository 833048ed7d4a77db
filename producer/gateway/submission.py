"""Taking a task on: recorded, published, confirmed; or refused with nothing left behind."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import OrderedDict
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from inferq.broker.messages import task_message
from inferq.producer.gateway.lookup import queued_line
from inferq.producer.gateway.problems import Fault, Refused, refusal_of
from inferq.producer.gateway.services import Services
from inferq.schemas import (
    MAX_BODY_BYTES,
    InferqError,
    InvalidTask,
    Outage,
    Result,
    Task,
    TaskStatus,
    new_task_id,
    parse_task,
)
from inferq.storage.objects.results import upload_key
from inferq.storage.objects.store import ObjectNotFound
from inferq.storage.status.index import StatusOutage, Submission

_FRESH = timedelta(hours=1)
_TELL_SECONDS = 1.0
_MOST_UNTOLD = 10_000
"""How many tasks are remembered of which Redis is still to be told; more are left to the workers."""

_log = logging.getLogger(__name__)


def complete(document: dict[str, Any], *, tenant: str, task_id: str | None = None) -> Task:
    """The task that a request's body asks for, with the id, tenant and time that it left out.

    Raises Refused (403) for another tenant's name and (422) for an id other than the path's, InvalidTask for
    everything that is wrong with the task itself.
    """
    if document.get("tenant", tenant) != tenant:
        raise Refused(403, "tenant_mismatch", "the API key belongs to another tenant than the body names")
    if document.get("batch_line") is not None:
        raise Refused(422, "invalid_task", "batch_line: it is set by whoever feeds a batch; leave it out")
    if task_id is not None and document.get("task_id", task_id) != task_id:
        raise Refused(422, "id_mismatch", "the body's task_id is not the one in the path")
    stamped = {
        "task_id": task_id or new_task_id(),
        "created_at": datetime.now(UTC).isoformat(timespec="milliseconds"),
        **document,
        "tenant": tenant,
    }
    if stamped["created_at"] is None:
        stamped["created_at"] = datetime.now(UTC).isoformat(timespec="milliseconds")
    try:
        body = json.dumps(stamped, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (ValueError, RecursionError) as error:
        raise InvalidTask(f"the body is not JSON: {error}", code="not_json") from error
    task = parse_task(body.encode("utf-8", "surrogatepass"))
    size = len(task.body())
    if size > MAX_BODY_BYTES:
        raise InvalidTask(
            f"the task has {size} bytes, the limit is {MAX_BODY_BYTES}; pass large inputs by URL",
            code="task_too_large",
        )
    return task


class Submitter:
    """Submits tasks. Each submission is a task of its own, which a client that leaves does not cut short.

    Submissions of one id at the same time are one submission.
    """

    def __init__(self, services: Services) -> None:
        self._services = services
        self._in_hand: dict[tuple[str, str], tuple[str, asyncio.Task[TaskStatus]]] = {}
        self._untold: OrderedDict[tuple[str, str], Task] = OrderedDict()
        self._telling: asyncio.Task[None] | None = None

    async def submit(self, task: Task, *, own_id: bool, traceparent: str | None = None) -> TaskStatus:
        """Where the task stands once the broker has it; `own_id` says that the client chose the id.

        Raises Refused: 409 where the id belongs to another task, 422 where an uploaded input does not exist,
        503 where the broker did not confirm.
        """
        key = (task.tenant, task.task_id)
        digest = task.digest()
        while (found := self._in_hand.get(key)) is not None:
            if found[0] == digest:
                return await asyncio.shield(found[1])
            await asyncio.wait([found[1]])
        running = asyncio.create_task(self._submit(task, own_id, traceparent))
        self._in_hand[key] = digest, running
        running.add_done_callback(lambda _: self._in_hand.pop(key))
        running.add_done_callback(_retrieved)
        return await asyncio.shield(running)

    async def finish(self) -> None:
        """Wait for the submissions in hand; each has its own limit."""
        if self._in_hand:
            await asyncio.wait([running for _, running in self._in_hand.values()])
        if self._telling is not None:
            self._telling.cancel()

    async def _submit(self, task: Task, own_id: bool, traceparent: str | None) -> TaskStatus:
        submission = await self._record(task)
        if submission is not None:
            if submission.conflict:
                raise _conflict(task)
            if submission.confirmed and not submission.new:
                return submission.status
        try:
            if own_id and not _just_made(task.task_id):
                known = await self._known(task)
                # A record without a digest is that of an unreadable message, which speaks for no task.
                if known is not None and known.digest is not None:
                    if known.digest != task.digest():
                        raise _conflict(task)
                    await self._forget(task)
                    return TaskStatus.of_result(known)
                if await self._is_line(task):
                    raise _conflict(task)
            await self._check_uploads(task)
            await self._publish(task, traceparent)
        except Exception:
            await self._forget(task)
            raise
        try:
            if not await self._services.on_redis(self._services.status.confirm, task):
                raise _conflict(task)
        except StatusOutage as error:
            _log.warning("task %s: queued, though Redis does not know: %s", task.task_id, error)
            self._tell_later(task)
        return submission.status if submission is not None else _queued(task)

    def _tell_later(self, task: Task) -> None:
        """Tell Redis of a task once it is back: nobody else would before a worker begins it."""
        self._untold[task.tenant, task.task_id] = task
        if len(self._untold) > _MOST_UNTOLD:
            self._untold.popitem(last=False)
        if self._telling is None or self._telling.done():
            self._telling = asyncio.create_task(self._tell())

    async def _tell(self) -> None:
        while self._untold:
            await asyncio.sleep(_TELL_SECONDS)
            with suppress(StatusOutage):
                while self._untold:
                    key, task = next(iter(self._untold.items()))
                    await self._services.on_redis(self._services.status.confirm, task)
                    self._untold.pop(key, None)

    async def _record(self, task: Task) -> Submission | None:
        try:
            return await self._services.on_redis(self._services.status.submit, task)
        except StatusOutage as error:
            # Redis is an index: the task runs without it, and the worker makes the record.
            _log.warning("task %s: submitted without Redis: %s", task.task_id, error)
            return None

    async def _known(self, task: Task) -> Result | None:
        try:
            return await self._services.glance(self._services.results.load, task.tenant, task.task_id)
        except Outage as error:
            # The worker looks again before it runs anything.
            _log.warning("task %s: whether it has ended before is not known: %s", task.task_id, error)
            return None

    async def _is_line(self, task: Task) -> bool:
        try:
            return await queued_line(self._services, task.tenant, task.task_id) is not None
        except Outage as error:
            # The worker looks again before it runs anything.
            _log.warning("task %s: whether it is a batch's line is not known: %s", task.task_id, error)
            return False

    async def _check_uploads(self, task: Task) -> None:
        for name, url in task.inputs().items():
            if not url.startswith("inferq:"):
                continue
            try:
                key = upload_key(task.tenant, url.removeprefix("inferq:"))
                await self._services.glance(self._services.store.stat, key)
            except ObjectNotFound as error:
                detail = f"there is no uploaded file {url!r}; upload it first (POST /v1/files)"
                raise Refused(
                    422, "unknown_file", f"{name}: {detail}", errors=(Fault(field=name, detail=detail),)
                ) from error
            except Outage as error:
                _log.warning("task %s: %s not looked at: %s", task.task_id, name, error)

    async def _publish(self, task: Task, traceparent: str | None) -> None:
        metrics = self._services.metrics
        begun = time.perf_counter()
        try:
            await self._services.publisher.confirm(
                task_message(task, traceparent=traceparent), timeout=self._services.settings.submit_timeout
            )
        except InferqError as error:
            refused = refusal_of(error)
            # With its id the client can submit the same task again; the broker may even have it.
            refused.about["task_id"] = task.task_id
            raise refused from error
        metrics.publish_seconds.observe(time.perf_counter() - begun)
        metrics.tasks_submitted.labels(task.task_type).inc()

    async def _forget(self, task: Task) -> None:
        try:
            await self._services.on_redis(self._services.status.forget, task)
        except StatusOutage as error:
            # What is left is unconfirmed, so that the next submission of this id publishes.
            _log.warning("task %s: its record could not be taken back: %s", task.task_id, error)


def _retrieved(running: asyncio.Task[TaskStatus]) -> None:
    # Where every client has left nobody else asks, and asyncio would complain.
    if not running.cancelled():
        running.exception()


def _conflict(task: Task) -> Refused:
    return Refused(
        409,
        "id_conflict",
        f"task {task.task_id!r} was submitted before with another content; choose another id",
        about={"task_id": task.task_id},
    )


def _just_made(task_id: str) -> bool:
    """Whether the id was made (UUID version 7) so lately that no task of that id can have been forgotten."""
    try:
        made = UUID(task_id)
    except ValueError:
        return False
    if made.version != 7:
        return False
    age = time.time() - (made.int >> 80) / 1000
    return abs(age) < _FRESH.total_seconds()


def _queued(task: Task) -> TaskStatus:
    return TaskStatus(
        task_id=task.task_id,
        task_type=task.task_type,
        tenant=task.tenant,
        state="queued",
        priority=task.priority,
        batch_id=task.batch_id,
        created_at=task.created_at,
    )
