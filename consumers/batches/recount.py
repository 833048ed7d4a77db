"""Recounts a batch from the object store, if Redis has lost or missed its state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from itertools import islice
from typing import Literal, TypeVar

from inferq.consumers.batches.services import BatchServices
from inferq.consumers.batches.tasks import task_of
from inferq.consumers.probes.registry import ENDS
from inferq.schemas import Batch, EndState, InvalidTask, Result, Task
from inferq.storage import BatchSource, UnreadableResult
from inferq.storage.batches.lines import Line, LineParser, named_id
from inferq.storage.batches.sources import Cursor, Sources

_MARKED_AT_ONCE = 1000
_LOOKED_UP_AT_ONCE = 200
_PASSED_AT_ONCE = 50_000

T = TypeVar("T")

Ends = dict[EndState | Literal["cached"], list[int]]


class Recount:
    """Corrects the index of one batch. Calls `renew` regularly to keep the lease."""

    def __init__(
        self, services: BatchServices, batch: Batch, source: BatchSource, renew: Callable[[], None]
    ) -> None:
        self._services = services
        self._batch = batch
        self._source = source
        self._renew = renew
        self._name = (batch.tenant, batch.batch_id)

    def all(self, cursor: Cursor) -> None:
        """Mark every line up to the cursor again: fed or invalid, and ended if it has a result."""
        index = self._services.index
        for part in in_parts(self._tasks(cursor), _MARKED_AT_ONCE):
            fed = [(line, task) for line, task in part if task is not None]
            index.mark(*self._name, "fed", [line for line, _ in fed])
            index.mark(*self._name, "invalid", [line for line, task in part if task is None])
            if self._source.own_ids:
                self._mark(self._look_up((line, task.task_id) for line, task in fed))
            self._renew()
        if not self._source.own_ids:
            self._list(cursor)

    def in_flight(self) -> None:
        """Mark the lines whose end Redis has missed."""
        with self._ids() as ids_of:
            for lines in self._unended():
                self._mark(self._look_up(ids_of(lines)))
                self._renew()
                if self._services.stopping.is_set():
                    return  # the next slice continues

    def cancel_in_flight(self) -> None:
        """Record all unfinished tasks as cancelled; a worker that gets their messages skips them."""
        error = InvalidTask("the batch was cancelled before the task ended", code="cancelled")
        for tasks in self.unended_tasks():
            with ThreadPoolExecutor(self._services.settings.batch_readers) as threads:
                kept = list(threads.map(lambda task: self._end(task, error), tasks))
            ends: Ends = {"succeeded": [], "failed": [], "cancelled": []}
            for result in kept:
                if result.batch_line is not None:
                    ends[result.status].append(result.batch_line)
            self._mark(ends)

    def unended_tasks(self) -> Iterator[list[Task]]:
        """The tasks that were fed and have not ended, according to Redis, in chunks."""
        parser = LineParser(self._batch)
        with self._picked() as pick, self._sources.taken(self._source) as taken:
            for lines in self._unended():
                tasks = []
                for line in pick(lines):
                    with suppress(InvalidTask):
                        tasks.append(task_of(parser, taken, line))
                yield tasks
                self._renew()

    def _unended(self) -> Iterator[list[int]]:
        """The fed lines without an end, according to Redis, in chunks."""
        after = 0
        while lines := self._services.index.unended(*self._name, after=after, limit=_LOOKED_UP_AT_ONCE):
            yield lines
            after = lines[-1]

    def _end(self, task: Task, error: InvalidTask) -> Result:
        ended = Result.failure(task, error, attempts=0, finished_at=datetime.now(UTC), status="cancelled")
        try:
            kept = self._services.results.save(ended)
        except UnreadableResult:
            return ended
        if kept is ended:
            ENDS.count(ended)
        if kept.batch_line != task.batch_line:
            return ended
        if self._source.own_ids:
            self._services.status.ended(kept)  # a queued task with an id of its own has a record
        return kept

    def _tasks(self, cursor: Cursor) -> Iterator[tuple[int, Task | None]]:
        """The lines up to the cursor with their tasks; None for an invalid line."""
        parser = LineParser(self._batch)
        with self._sources.lines(self._source) as lines, self._sources.taken(self._source) as taken:
            for line in lines:
                if line.number > cursor.line:
                    return
                if line.blank:
                    continue
                try:
                    yield line.number, task_of(parser, taken, line)
                except InvalidTask:
                    yield line.number, None

    @contextmanager
    def _picked(self) -> Iterator[Callable[[list[int]], Iterator[Line]]]:
        """A function from line numbers to lines. With ascending numbers it reads the source once."""
        with self._sources.lines(self._source) as lines:

            def pick(numbers: list[int]) -> Iterator[Line]:
                for number in numbers:
                    for line in lines:
                        if line.number % _PASSED_AT_ONCE == 0:
                            self._renew()
                        if line.number == number:
                            yield line
                            break

            yield pick

    @contextmanager
    def _ids(self) -> Iterator[Callable[[list[int]], Iterator[tuple[int, str]]]]:
        """A function from line numbers to (line, task id), like `_picked`."""
        own_id = self._batch.task_id
        if not self._source.own_ids:
            yield lambda numbers: ((number, own_id(number)) for number in numbers)
            return
        with self._picked() as pick:
            yield lambda numbers: (
                (line.number, named_id(line.content) or own_id(line.number)) for line in pick(numbers)
            )

    def _look_up(self, ids: Iterable[tuple[int, str]]) -> Ends:
        """The lines that have ended, by state, from their results."""

        def state(pair: tuple[int, str]) -> tuple[int, EndState | None, bool]:
            line, task_id = pair
            try:
                result = self._services.results.load(self._batch.tenant, task_id)
            except UnreadableResult:
                return line, "failed", False  # the worker dead-letters the task, too
            if result is None:
                return line, None, False
            if not belongs(result, self._batch, line):
                return line, "failed", False
            return line, result.status, result.cached

        ends: Ends = {"succeeded": [], "failed": [], "cancelled": [], "cached": []}
        with ThreadPoolExecutor(self._services.settings.batch_readers) as threads:
            for line, end, cached in threads.map(state, list(ids)):
                if end is not None:
                    ends[end].append(line)
                if cached:
                    ends["cached"].append(line)
        return ends

    def _list(self, cursor: Cursor) -> None:
        """Mark the ends that a listing of results finds: one request per thousand results."""
        prefix = f"{self._batch.batch_id}."
        found = self._services.results.endings(self._batch.tenant, prefix)
        for part in in_parts(found, _MARKED_AT_ONCE):
            succeeded: list[int] = []
            others: list[int] = []
            for task_id, success in part:
                number = task_id.removeprefix(prefix)
                if number.isdigit() and 1 <= int(number) <= cursor.line:
                    (succeeded if success else others).append(int(number))
            self._mark({"succeeded": succeeded, "failed": [], "cancelled": []})
            self._mark(self._look_up((line, self._batch.task_id(line)) for line in others))
            self._renew()

    def _mark(self, ends: Ends) -> None:
        for state, lines in ends.items():
            if not lines:
                continue
            if state == "cached":
                self._services.index.mark(*self._name, state, lines)
            else:
                self._services.index.ends(*self._name, state, lines)

    @property
    def _sources(self) -> Sources:
        return self._services.sources


def belongs(result: Result, batch: Batch, line: int) -> bool:
    """Whether the result is of this line, not of another task with the same id."""
    return result.batch_id == batch.batch_id and result.batch_line == line


def in_parts(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """The items in lists of up to `size`."""
    rest = iter(items)
    while part := list(islice(rest, size)):
        yield part
