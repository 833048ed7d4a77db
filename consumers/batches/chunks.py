"""The chunks of a slice: lines read, published together, and marked as fed once RabbitMQ has confirmed them."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

from inferq.broker import Message, PublishRejected, task_message
from inferq.consumers.batches.services import BatchServices
from inferq.consumers.batches.tasks import task_of
from inferq.schemas import Batch, InvalidTask, Task, tracing
from inferq.storage import BatchSource, Step
from inferq.storage.batches.lines import Line, LineParser
from inferq.storage.batches.sources import Cursor, DuplicateIds

CHUNK = 500
"""Lines published, confirmed and marked together."""
_CHUNK_BYTES = 4 << 20
"""A chunk ends once its lines exceed this size."""
_MAX_UNCONFIRMED_CHUNKS = 4

_log = logging.getLogger(__name__)


@dataclass
class _Chunk:
    cursor: Cursor
    fed: list[int] = field(default_factory=list)
    invalid: list[int] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    recorded: list[tuple[Task, str]] = field(default_factory=list)
    confirmed: Future[None] | None = None


class Feeding:
    """Feeds the lines of one slice from its cursor on."""

    def __init__(
        self,
        services: BatchServices,
        batch: Batch,
        source: BatchSource,
        lines: Iterator[Line],
        taken: DuplicateIds,
        *,
        cursor: Cursor,
        reached: int,
        step: partial[Step],
        ends: float,
    ) -> None:
        """`reached`: the highest line that may have been fed before. `step` advances the batch's index. `ends`: the
        monotonic time after which no refused line is tried again.
        """
        self._services = services
        self._name = (batch.tenant, batch.batch_id)
        self._parser = LineParser(batch)
        self._lines = lines
        self._taken = taken
        self._step = step
        self._ends = ends
        self._reached = reached
        self._chunks: deque[_Chunk] = deque()
        self.cursor = cursor  # all lines up to it are marked
        self._read = cursor
        self._high_water = 0
        # A queued task with an id of its own is known only by a record; a generated id names its batch and line.
        self._recording = source.own_ids
        self._link = tracing.current().context
        # Decided without reading, so that a closed window does not hide the end.
        self._exhausted = cursor.line >= source.lines

    @property
    def done(self) -> bool:
        """Whether every line is published and marked."""
        return self._exhausted and not self._chunks

    @property
    def unmarked(self) -> int:
        """The number of tasks published and not yet marked as fed."""
        return sum(len(chunk.fed) for chunk in self._chunks)

    def feed(self, count: int) -> bool:
        """Publish the next lines, up to `count`. Returns False once all lines are read."""
        if self._exhausted:
            return False
        services = self._services
        last = self._read.line
        if self._high_water < last + 2 * CHUNK:
            # A worker may finish a line before it is marked; the index must accept its end.
            self._high_water = last + 8 * CHUNK
            self._step(high_water=self._high_water)
        processed: frozenset[int] = frozenset()
        if last < self._reached:
            processed = services.index.processed(*self._name, last + 1, last + count)
        chunk = _Chunk(self._read)
        size = 0
        for _ in range(count):
            if size > _CHUNK_BYTES:
                break
            line = next(self._lines, None)
            if line is None:
                self._exhausted = True
                break
            size += line.length
            chunk.cursor = Cursor(line.number, line.end)
            if line.blank or line.number in processed:
                continue
            try:
                task = task_of(self._parser, self._taken, line)
            except InvalidTask:
                chunk.invalid.append(line.number)
                continue
            chunk.fed.append(line.number)
            digest = task.digest()
            chunk.messages.append(task_message(task, digest=digest, link=self._link))
            if self._recording:
                chunk.recorded.append((task, digest))
        if chunk.cursor != self._read:
            self._read = chunk.cursor
            if chunk.recorded:
                # Before they are published: afterwards a worker may already have finished them.
                services.status.confirm_all(chunk.recorded)
            chunk.confirmed = services.publisher.publish_all(chunk.messages)
            self._chunks.append(chunk)
        return True

    def drain(self) -> None:
        """Wait for all confirms and mark the chunks."""
        while self._chunks:
            self.settle(wait=True)

    def settle(self, *, wait: bool = False) -> Step:
        """Mark the confirmed chunks. Waits for the oldest if too many are unconfirmed."""
        step = None
        while self._chunks:
            oldest = self._chunks[0]
            confirmed = oldest.confirmed
            full = len(self._chunks) >= _MAX_UNCONFIRMED_CHUNKS or self._exhausted
            if not (wait or full or confirmed is None or confirmed.done()):
                break
            try:
                self._wait(oldest)
            except PublishRejected:
                # The cursor stays before the refused line.
                for chunk in self._chunks:
                    self._mark_confirmed(chunk)
                raise
            step = self._mark(oldest)
            self._chunks.popleft()
            wait = False
        return step or self._step()

    def _mark(self, chunk: _Chunk) -> Step:
        line, offset = chunk.cursor
        step = self._step(
            high_water=self._high_water, line=line, offset=offset, fed=chunk.fed, invalid=chunk.invalid
        )
        self.cursor = chunk.cursor
        return step

    def _wait(self, chunk: _Chunk) -> None:
        """Wait until all messages of the chunk are confirmed. Those that a full queue refuses are published again."""
        while chunk.confirmed is not None:
            try:
                chunk.confirmed.result()
                return
            except PublishRejected as rejected:
                if self._services.stopping.is_set() or time.monotonic() > self._ends:
                    raise
                _log.info("batch %s: a queue is full, waiting: %s", self._name[1], rejected)
                self._services.stopping.wait(self._services.pauses.rejected)
                again = rejected.refused or chunk.messages
            chunk.confirmed = self._services.publisher.publish_all(again)

    def _mark_confirmed(self, chunk: _Chunk) -> None:
        """Mark the confirmed tasks of a chunk that a full queue refused in part, so that no later slice feeds them."""
        refused: list[Message] = []
        try:
            if chunk.confirmed is not None:
                chunk.confirmed.result()
        except PublishRejected as rejected:
            refused = rejected.refused or chunk.messages
        unfed = {message.message_id for message in refused}
        fed = [
            line
            for line, message in zip(chunk.fed, chunk.messages, strict=True)
            if message.message_id not in unfed
        ]
        self._step(high_water=self._high_water, fed=fed)
