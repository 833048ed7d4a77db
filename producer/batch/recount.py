"""How the lines of a batch stand in truth: looked up in the object store, where Redis does not know."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from itertools import islice
from typing import TypeVar

from producer.batch.lines import LineParser, named_id
from producer.batch.sources import Cursor, Sources
from producer.batch.surroundings import Surroundings
from producer.batch.tasks import task_of
from schemas import Batch, EndState, InvalidTask, Result, Task
from storage import BatchSource, UnreadableResult

_MARKED_AT_ONCE = 1000
_LOOKED_UP_AT_ONCE = 200

T = TypeVar("T")

Ends = dict[EndState, list[int]]


class Recount:
    """Makes the index of one batch right. `renew` is called every now and then, to keep the lease."""

    def __init__(
        self, around: Surroundings, batch: Batch, source: BatchSource, renew: Callable[[], None]
    ) -> None:
        self._around = around
        self._batch = batch
        self._source = source
        self._renew = renew
        self._name = (batch.tenant, batch.batch_id)

    def all(self, cursor: Cursor) -> None:
        """Mark every line up to the cursor anew: as fed or invalid, and as ended where it is."""
        index = self._around.index
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
        """Mark those lines as ended whose end Redis has missed; looks on for as long as it finds any."""
        after = 0
        while lines := self._around.index.unended(*self._name, after=after, limit=_LOOKED_UP_AT_ONCE):
            after = lines[-1]
            found = self._look_up(self._ids(lines))
            self._mark(found)
            self._renew()
            if not any(found.values()):
                return

    def cancel_in_flight(self) -> None:
        """Record the end of whatever has not ended: its message finds that, and nothing is run."""
        error = InvalidTask("the batch was cancelled before the task ended", code="cancelled")
        after = 0
        while lines := self._around.index.unended(*self._name, after=after, limit=_LOOKED_UP_AT_ONCE):
            after = lines[-1]
            tasks = [task for line, task in self._tasks(Cursor(after, 0), frozenset(lines)) if task]
            with ThreadPoolExecutor(self._around.settings.batch_readers) as threads:
                kept = list(threads.map(lambda task: self._end(task, error), tasks))
            ends: Ends = {"succeeded": [], "failed": [], "cancelled": []}
            for result in kept:
                if result.batch_line is not None:
                    ends[result.status].append(result.batch_line)
            self._mark(ends)
            self._renew()

    def _end(self, task: Task, error: InvalidTask) -> Result:
        ended = Result.failure(task, error, attempts=0, finished_at=datetime.now(UTC), status="cancelled")
        try:
            kept = self._around.results.save(ended)
        except UnreadableResult:
            return ended
        return kept if kept.batch_line == task.batch_line else ended

    def _tasks(
        self, cursor: Cursor, wanted: frozenset[int] | None = None
    ) -> Iterator[tuple[int, Task | None]]:
        """The lines up to the cursor and their tasks, None where a line is invalid."""
        parser = LineParser(self._batch)
        with self._sources.lines(self._source) as lines, self._sources.taken(self._source) as taken:
            for line in lines:
                if line.number > cursor.line:
                    return
                if line.blank or (wanted is not None and line.number not in wanted):
                    continue
                try:
                    yield line.number, task_of(parser, taken, line)
                except InvalidTask:
                    yield line.number, None

    def _ids(self, lines: list[int]) -> Iterator[tuple[int, str]]:
        """The lines with the ids of their tasks."""
        if not self._source.own_ids:
            yield from ((line, self._batch.task_id(line)) for line in lines)
            return
        wanted = set(lines)
        with self._sources.lines(self._source) as read:
            for line in read:
                if line.number in wanted:
                    yield line.number, named_id(line.content) or self._batch.task_id(line.number)
                    wanted.discard(line.number)
                    if not wanted:
                        return

    def _look_up(self, ids: Iterable[tuple[int, str]]) -> Ends:
        """Which of these lines have ended, by their results."""

        def state(pair: tuple[int, str]) -> tuple[int, EndState | None]:
            line, task_id = pair
            try:
                result = self._around.results.load(self._batch.tenant, task_id)
            except UnreadableResult:
                return line, "failed"  # the worker has put the task aside, too
            if result is None:
                return line, None
            return line, result.status if belongs(result, self._batch, line) else "failed"

        ends: Ends = {"succeeded": [], "failed": [], "cancelled": []}
        with ThreadPoolExecutor(self._around.settings.batch_readers) as threads:
            for line, end in threads.map(state, list(ids)):
                if end is not None:
                    ends[end].append(line)
        return ends

    def _list(self, cursor: Cursor) -> None:
        """Mark what a listing of the results finds: a request for a thousand of them, not one for each."""
        prefix = f"{self._batch.batch_id}."
        found = self._around.results.endings(self._batch.tenant, prefix)
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
            if lines:
                self._around.index.ends(*self._name, state, lines)

    @property
    def _sources(self) -> Sources:
        return self._around.sources


def belongs(result: Result, batch: Batch, line: int) -> bool:
    """Whether the result is that of this line, and not of another task that has the same id."""
    return result.batch_id == batch.batch_id and result.batch_line == line


def in_parts(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """The items, some at a time."""
    rest = iter(items)
    while part := list(islice(rest, size)):
        yield part
