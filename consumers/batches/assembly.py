"""Assembles the results of a batch: reads the source again, and each line's result beside it.

It may be repeated: the two files come out identical, and the summary is written once, after them. Memory is
bounded by the number of results read ahead. Of a large output, which is an artifact, only the page count is kept.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from inferq.broker import callback_message
from inferq.broker.spans import sending_job
from inferq.consumers.batches.recount import belongs
from inferq.consumers.batches.services import BatchServices
from inferq.consumers.batches.tasks import task_of
from inferq.schemas import (
    Batch,
    BatchCounts,
    BatchEndState,
    BatchState,
    BatchSummary,
    EndState,
    ErrorInfo,
    InferqError,
    InvalidTask,
    Outage,
    Result,
    Task,
    batch_callback,
)
from inferq.schemas.paths import artifact_url
from inferq.schemas.trace_context import TraceContext
from inferq.storage import BatchSource, ResultStore, UnreadableResult, errors_key, output_key
from inferq.storage.batches.lines import Line, LineParser, SourceRefused, SourceUnusable, named_id

_AHEAD = 4
"""Results read ahead of the one being written, per reader."""
_JSONL = "application/x-ndjson"

_log = logging.getLogger(__name__)


_LineEnd = EndState | Literal["invalid"]


@dataclass
class _Tally:
    """How many lines ended in each state or were answered by the result cache, and the reasons of those that failed or
    were invalid."""

    total: int = 0
    pages: int | None = None
    ends: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)

    def add(self, state: _LineEnd, code: str) -> None:
        self.ends[state] += 1
        if state in ("failed", "invalid"):
            self.failures[code] += 1

    def counts(self) -> BatchCounts:
        return BatchCounts(total=self.total, **self.ends)


class _Read(NamedTuple):
    """A task's result, if it has one, and the number of pages in its output."""

    result: Result | None
    pages: int | None = None


@dataclass(frozen=True)
class _Entry:
    """A line with its task and pending result, or with the reason why it is invalid."""

    line: Line
    found: tuple[Task, Future[_Read]] | InvalidTask


class Unfinished(Exception):
    """A task of the batch has not ended yet."""


def end(
    services: BatchServices,
    batch: Batch,
    error: str | None = None,
    *,
    doubtful: bool = False,
    trace: TraceContext | None = None,
) -> BatchSummary:
    """Finish a batch like `Assembly.run`, even if its source has disappeared since feeding.

    While that is `doubtful`, raises SourceRefused instead. `trace`: the span that finishes it.
    """
    assembly = Assembly(services, batch, trace)
    try:
        return assembly.run(error)
    except SourceUnusable as gone:
        if doubtful and isinstance(gone, SourceRefused):
            raise
        return assembly.run(gone.message)


class Assembly:
    """Finishes one batch. `run` may raise any Outage; call it again then."""

    def __init__(self, services: BatchServices, batch: Batch, trace: TraceContext | None = None) -> None:
        self._services = services
        self._batch = batch
        self._trace = trace
        self._name = (batch.tenant, batch.batch_id)
        self._cancelled = services.batches.cancel_requested(*self._name)

    def run(self, error: str | None = None) -> BatchSummary:
        """Write `output.jsonl`, `errors.jsonl` and the summary, then publish the callback.

        `error` says why feeding failed. Raises Unfinished and SourceUnusable.
        """
        services, batch = self._services, self._batch
        services.batches.enlist(batch)  # an older version may have recorded and fed it
        summary = services.batches.summary(*self._name)
        if summary is None:
            self._set_state("finishing")
            summary = services.batches.finish(self._summary(self._write(error), error))
        if batch.callback_url is not None:
            callback = batch_callback(summary, batch.callback_url)
            with sending_job("inference.callbacks", callback.callback_id) as span:
                services.confirm(callback_message(callback, trace=span.context or self._trace))
        self._set_state(summary.state, summary.error)
        _log.info("batch %s: %s", batch.batch_id, summary.state)
        return summary

    def _write(self, error: str | None) -> _Tally:
        tally = _Tally()
        store = self._services.store
        with tempfile.TemporaryDirectory(prefix="inferq-batch-") as folder:
            output, errors = Path(folder) / "output.jsonl", Path(folder) / "errors.jsonl"
            with output.open("wb") as succeeded, errors.open("wb") as others:
                source = self._services.batches.source(*self._name)
                if source is not None and error is not None:
                    self._count(source, tally)
                elif source is not None:
                    for line in self._entries(source):
                        document, well = self._document(line, tally)
                        (succeeded if well else others).write(_line(document))
            store.put(output_key(*self._name), output, content_type=_JSONL)
            store.put(errors_key(*self._name), errors, content_type=_JSONL)
        return tally

    def _entries(self, source: BatchSource) -> Iterator[_Entry]:
        """The lines with their results, in order, read ahead."""
        readers = self._services.settings.batch_readers
        parser = LineParser(self._batch)
        waiting: deque[_Entry] = deque()
        with (
            ThreadPoolExecutor(readers) as threads,
            self._services.sources.lines(source) as lines,
            self._services.sources.taken(source) as taken,
        ):
            for line in lines:
                if line.blank:
                    continue
                try:
                    task = task_of(parser, taken, line)
                except InvalidTask as error:
                    waiting.append(_Entry(line, error))
                else:
                    read = threads.submit(self._read, task, line.number)
                    waiting.append(_Entry(line, (task, read)))
                if len(waiting) > readers * _AHEAD:
                    yield waiting.popleft()
            while waiting:
                yield waiting.popleft()

    def _read(self, task: Task, number: int) -> _Read:
        results = self._services.results
        result = results.load_success(task.tenant, task.task_id)
        if result is None or result.status != "succeeded" or not belongs(result, self._batch, number):
            return _Read(result)
        return _Read(result, pages_of(results, result))

    def _count(self, source: BatchSource, tally: _Tally) -> None:
        """Count the ends without reading the lines."""
        tally.total = source.total
        # A listing cannot find tasks with ids of their own; Redis may know them.
        standing = self._services.index.look(*self._name) if source.own_ids else None
        if standing is not None and standing.known:
            for state in (*get_args(EndState), "invalid", "cached"):
                tally.ends[state] = getattr(standing.counts, state)
            return
        prefix = f"{self._batch.batch_id}."
        others: list[str] = []
        for task_id, success in self._services.results.endings(self._batch.tenant, prefix):
            if not task_id.removeprefix(prefix).isdigit():
                continue
            if success:
                tally.ends["succeeded"] += 1
            else:
                others.append(task_id)
        with ThreadPoolExecutor(self._services.settings.batch_readers) as threads:
            for state, code in threads.map(self._ending, others):
                tally.add(state, code)

    def _ending(self, task_id: str) -> tuple[EndState, str]:
        try:
            result = self._services.results.load(self._batch.tenant, task_id)
        except UnreadableResult as unreadable:
            return "failed", unreadable.code
        if result is None:
            return "failed", "unknown"
        return result.status, result.error.code if result.error is not None else "unknown"

    def _document(self, entry: _Entry, tally: _Tally) -> tuple[dict[str, Any], bool]:
        """The JSON document of a line, and whether it belongs into `output.jsonl`."""
        tally.total += 1
        number = entry.line.number
        if isinstance(entry.found, InvalidTask):
            named = {"task_id": task_id} if (task_id := named_id(entry.line.content)) else {}
            return _unsuccessful({"line": number, **named}, "invalid", entry.found, tally)
        task, coming = entry.found
        about = {"line": number, "task_id": task.task_id, "task_type": task.task_type}
        try:
            result, pages = coming.result()
        except UnreadableResult as unreadable:
            # Nothing may overwrite it; waiting for a repair would block the batch forever.
            return _unsuccessful(about, "failed", unreadable, tally)
        if result is not None and not belongs(result, self._batch, number):
            taken = InvalidTask(
                f"task id {task.task_id!r} belongs to another task, submitted before this line; choose another id",
                code="id_conflict",
            )
            return _unsuccessful(about, "failed", taken, tally)
        if result is None:
            if not self._cancelled:
                raise Unfinished
            error = InvalidTask("the batch was cancelled before the task was started", code="cancelled")
            return _unsuccessful(about, "cancelled", error, tally)
        if pages is not None:
            tally.pages = (tally.pages or 0) + pages
        return self._ended(about, result, tally)

    def _ended(self, about: dict[str, Any], result: Result, tally: _Tally) -> tuple[dict[str, Any], bool]:
        kept = result.model_dump(
            mode="json",
            exclude_defaults=True,
            include={"artifacts", "attempts", "timings", "metadata", "finished_at", "cached"},
        )
        for artifact in kept.get("artifacts", ()):
            artifact["url"] = artifact_url(self._services.storage.api_url, result.task_id, artifact["name"])
        if result.status == "succeeded":
            tally.ends["succeeded"] += 1
            tally.ends["cached"] += result.cached
            return {**about, "status": "succeeded", "output": result.output, **kept}, True
        error = result.error or ErrorInfo(code="unknown", message="", retryable=True)
        tally.add(result.status, error.code)
        return {**about, "status": result.status, "error": error.model_dump(mode="json"), **kept}, False

    def _summary(self, tally: _Tally, error: str | None) -> BatchSummary:
        batch, now = self._batch, self._services.clock()
        seconds = max((now - batch.created_at).total_seconds(), 0.001)
        state: BatchEndState = "completed"
        if self._cancelled:
            state = "cancelled"
        elif error is not None:
            state = "failed"
        ended = tally.ends["succeeded"] + tally.ends["failed"]
        return BatchSummary(
            batch_id=batch.batch_id,
            tenant=batch.tenant,
            state=state,
            counts=tally.counts(),
            failures=dict(tally.failures.most_common()),
            error=error,
            seconds=round(seconds, 3),
            tasks_per_second=round(ended / seconds, 3),
            pages=tally.pages,
            pages_per_second=round(tally.pages / seconds, 3) if tally.pages is not None else None,
            schedule=batch.schedule,
            metadata=batch.metadata,
            trace_id=self._trace.trace_id if self._trace is not None else None,
            created_at=batch.created_at,
            finished_at=now,
        )

    def _set_state(self, state: BatchState, error: str | None = None) -> None:
        try:
            self._services.index.set_state(*self._name, state, error)
        except Outage as outage:
            # The summary in the object store has the state, too.
            _log.warning("batch %s: cannot write its state to Redis: %s", self._batch.batch_id, outage)


def pages_of(results: ResultStore, result: Result) -> int | None:
    """The number of pages of an output; None for an output without pages. Raises StoreOutage."""
    try:
        output = results.output(result)
    except UnreadableResult:
        return None
    pages = output.get("pages") if isinstance(output, dict) else None
    return len(pages) if isinstance(pages, list) else None


def _unsuccessful(
    about: dict[str, Any], state: _LineEnd, error: InferqError, tally: _Tally
) -> tuple[dict[str, Any], bool]:
    """The document of a line without a result, as `_document` gives it."""
    tally.add(state, error.code)
    return {**about, "status": state, "error": ErrorInfo.of(error).model_dump(mode="json")}, False


def _line(document: dict[str, Any]) -> bytes:
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "replace") + b"\n"
