"""Feeds the lost lines of a batch again: those with neither a result nor a message.

A purge or a deletion of a queue loses messages. A lifecycle rule may delete a result before the batch is assembled.
A queue cannot be searched, so a line counts as lost after a time without progress. A wrong guess is harmless: the ids
of lines are fixed, and the second message of a task finds the first one's result.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing, suppress
from functools import cache

from pika.exceptions import AMQPConnectionError, ChannelClosedByBroker

from inferq.broker import (
    BrokerSettings,
    BrokerUnavailable,
    PublishRejected,
    connect,
    task_message,
    work_queue,
)
from inferq.consumers.batches.services import BatchServices
from inferq.schemas import Task, tracing
from inferq.storage import Stall

_BUSY_SECONDS = 600.0
"""How long a stall lasts before lines are fed again into a queue with messages, which may be theirs."""
_HELD_SECONDS = 7200.0
"""How long a stall lasts before a line is fed again that Redis calls running or waiting for a retry."""

_log = logging.getLogger(__name__)


def refeed_due(stall: Stall, now: float) -> bool:
    """Whether to look for lost lines: after a recount that found no end, then at doubling intervals."""
    return stall.asked > 0 and now - stall.since > 2 * stall.fed_again


class LostLines:
    """The lost lines of a batch; `lasted` is how many seconds ago one of its tasks last ended.

    `count` is `messages_in` for one broker; each queue is counted once.
    """

    def __init__(self, services: BatchServices, lasted: float, count: Callable[[str], int | None]) -> None:
        self._services = services
        self._lasted = lasted
        self._messages = cache(count)

    def feed_again(self, unended: Iterable[Sequence[Task]]) -> int:
        """Publish those of the `unended` tasks that are lost; gives how many."""
        count = 0
        with suppress(PublishRejected):  # of a full queue: the next look publishes the rest
            for tasks in unended:
                lost = [task for task in tasks if self.is_lost(task)]
                if lost:
                    count += len(lost)
                    link = tracing.current().context
                    messages = [task_message(task, digest=task.digest(), link=link) for task in lost]
                    self._services.publisher.publish_all(messages).result()
        return count

    def is_lost(self, task: Task) -> bool:
        """Whether neither a queue nor a worker seems to have the task."""
        waiting = self._messages(work_queue(task.task_type, task.priority))
        if waiting is None or (waiting and self._lasted < _BUSY_SECONDS):
            return False
        known = self._services.status.get(task.tenant, task.task_id)
        held = known is not None and known.state in ("running", "retrying")
        return not held or self._lasted >= _HELD_SECONDS


def messages_in(broker: BrokerSettings, queue: str) -> int | None:
    """How many messages wait in the queue; None if it does not exist or cannot be counted."""
    try:
        with closing(connect(broker, name="batches")) as connection:
            declared = connection.channel().queue_declare(queue, passive=True)
    except (BrokerUnavailable, AMQPConnectionError, ChannelClosedByBroker) as error:
        _log.debug("queue %s cannot be counted: %s", queue, error)
        return None
    return int(declared.method.message_count or 0)
