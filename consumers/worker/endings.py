"""Puts the end of a task on record and reports it: in the object store, in Redis, and to its owner.

A task that fails for good ends in this order: dead letter, record, status, callback, ack. Dead letter, record and
callback wait for an unavailable service. The status, which is only an index, is retried after the ack if Redis did
not answer before. A crash between two steps repeats the later ones, which changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from inferq.broker import Message
from inferq.broker.spans import sending, traced
from inferq.consumers.worker.notifier import Notifier
from inferq.consumers.worker.services import WorkerServices
from inferq.schemas import CallbackEvent, Result, Task, tracing
from inferq.schemas.trace_context import TraceContext
from inferq.storage import CommandGroup


class Endings:
    """The effects of one delivery's end. `notifier` reports to the task's owner; nothing until a URL is set."""

    def __init__(self, services: WorkerServices, trace: TraceContext | None = None) -> None:
        self._services = services
        self._trace = trace
        self._replies: list[Callable[[], bool]] = []
        self.notifier = self._notifier(None)

    def use_callbacks_of(self, task: Task) -> None:
        """From now on, report to the task's callback URL if it has one."""
        self.use_callback_url(task.callback_url, task)

    def use_callback_url(self, url: str | None, task: Task | None = None) -> None:
        """The same for a URL alone: of a message that is no task."""
        events = {} if task is None else {"events": task.callback_events}
        self.notifier = self._notifier(url, **events)

    def publish(self, message: Message) -> None:
        """Publish a copy of the delivery and wait for its confirm, however long the broker is unavailable."""
        with sending(message) as span:
            self._confirm(traced(message, span.context))

    def dead_letter(self, message: Message) -> None:
        """Publish a dead letter, as `publish` does."""
        self.publish(message)
        self._services.metrics.dead_letter(self._services.task_type.name)

    def _confirm(self, message: Message) -> None:
        def confirmed() -> None:
            self._services.publisher.publish(message).result()

        self._services.retry_until_available("RabbitMQ", confirmed)

    def _notifier(self, url: str | None, **events: tuple[CallbackEvent, ...]) -> Notifier:
        return Notifier(self._services.publisher, self._confirm, url=url, trace=self._trace, **events)

    def load(self, tenant: str, task_id: str, checkpoint: Callable[[], None] | None = None) -> Result | None:
        """The record of an earlier end. Raises UnreadableResult, and what `checkpoint` raises while it waits."""
        load = partial(self._services.results.load, tenant, task_id)
        return self._services.retry_until_available("object store", load, checkpoint)

    def record(
        self,
        result: Result,
        output: bytes | None = None,
        *,
        engine_seconds: float = 0.0,
        before_report: Callable[[Result], None] | None = None,
    ) -> Result:
        """Write how the task ended, once, and report what is kept: the first record wins.

        `output` is the output as JSON text, which the result leaves out. `engine_seconds` counts for the tenant's
        usage if the result is the first one. `before_report` is called with what is kept. It raises nothing.
        """
        with tracing.span("record"):
            save = partial(self._services.results.save, result, output)
            kept = self._services.retry_until_available("object store", save)
            if before_report is not None:
                before_report(kept)
            self.saved(result, kept, output, engine_seconds=engine_seconds)
            return kept

    def saved(
        self,
        result: Result,
        kept: Result,
        output: bytes | None = None,
        *,
        engine_seconds: float,
        group: CommandGroup | None = None,
    ) -> None:
        """Report an end that was to be recorded by what is kept. With a `group`, as in `report`."""
        if kept is not result:
            self.report(kept, digest=result.digest, group=group)
            return
        self._services.metrics.ended(result)
        self.report(kept, output, digest=result.digest, engine_seconds=engine_seconds, group=group)

    def report(
        self,
        kept: Result,
        output: bytes | None = None,
        *,
        digest: str | None,
        engine_seconds: float | None = None,
        group: CommandGroup | None = None,
    ) -> None:
        """Report an end that is on record: to the status index and, if it is this task's own, to its owner.

        With `engine_seconds` it counts in the tenant's usage. With a `group` it does not wait: the status goes with
        the group, and `notifier.settle` waits for the callback's confirm.
        """
        services = self._services
        ended = partial(
            services.status.ended_pipelined, kept, output, engine_seconds=engine_seconds, group=group
        )
        reply = services.best_effort(ended)
        if reply is not None:
            self._replies.append(reply)
        # While Redis answers. Another task's record under this id is not this task's to report.
        if kept.digest == digest:
            self.notifier.ended(kept, output, wait=group is None)

    def wait_for_replies(self) -> None:
        """Read the answers of the status index, which came while other work went on."""
        for reply in self._replies:
            self._services.report_end(reply)
        self._replies.clear()
