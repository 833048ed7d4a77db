"""`AsyncClient`, the Python client of the gateway for asynchronous code.

sync_client.py is generated from this file: run `make generate` after a change.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, TypeVar

import httpx
from pydantic import JsonValue

from inferq.producer.client.async_io import chunks_of, sleep, write_chunk
from inferq.producer.client.connection import connection_arguments
from inferq.producer.client.events import EventStream
from inferq.producer.client.requests import (
    Api,
    Flow,
    Reply,
    Request,
    Sleep,
    UploadedFile,
)
from inferq.producer.client.transfers import (
    CHUNK_BYTES,
    Source,
    is_batch_url,
    new_file,
    open_upload,
    target_path,
)
from inferq.schemas import (
    BatchStatus,
    CallbackEvent,
    CallbackRecord,
    Event,
    Priority,
    Result,
    State,
    SubjectKind,
    TaskStatus,
    new_task_id,
)
from inferq.schemas.monitor import Demand, Stats, WorkerList
from inferq.schemas.paths import artifact_path, batch_path

__all__ = ["AsyncClient"]

T = TypeVar("T")


class AsyncClient:
    """The gateway's API for asyncio and trio. `Client` has the same methods for code without an event loop.

    ```python
    async with AsyncClient("http://127.0.0.1:8000", "iq_...") as client:
        page = await client.upload("page.png")
        task = await client.submit("ocr", image_url=page)
        result = await client.result(task.task_id, wait=60)
        print(result.output)
    ```

    Use one client for many calls, also at the same time: it keeps its connections open.

    A request without an answer, or with the status 429, 502, 503 or 504, is sent again. The client waits for the
    time in `Retry-After`, or else for a delay that doubles from 0.25 to 30 seconds. A retry sends the same id, so it
    never creates a second task or batch.

    Every method can raise these errors:

    - `Unauthorized`: the API key is missing or unknown.
    - `Unavailable`: the gateway is unreachable or cannot answer now, and every retry failed.
    - `ApiError`: any other error answer. It is the base class of all of them.

    Args:
        api_url: The gateway's address, such as `https://inferq.example.com`. Default: the setting INFERQ_API_URL.
        api_key: The API key. Default: the setting INFERQ_API_KEY.
        timeout: Seconds that connecting, sending or receiving may stall. While the gateway waits for a task's
            end, the time it was asked to wait is added.
        retries: How often a failed request is sent again.
        transport: The httpx transport to send requests through, for example a mock in tests.

    Raises:
        InstallationError: The address or the key cannot work.
    """

    def __init__(
        self,
        api_url: str | None = None,
        api_key: str | None = None,
        *,
        timeout: float = 30.0,
        retries: int = 4,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._http = httpx.AsyncClient(**connection_arguments(api_url, api_key), transport=transport)
        self._timeout = timeout
        self._api = Api(retries)

    async def upload(
        self, source: Source, *, filename: str | None = None, content_type: str | None = None
    ) -> str:
        """Upload a file, and return the `inferq:` URL that a task can use as an input.

        The file is streamed: it can be larger than memory.

        Args:
            source: A path, the content as bytes, or an open binary file. An open file is read from its present
                position and stays open. If it cannot seek, such as a pipe, a failed upload is not repeated.
            filename: A name whose extension the URL gets. Default: the path's own name.
            content_type: The media type. Default: `application/octet-stream`.

        Raises:
            InvalidRequest: The file is larger than the gateway accepts.
            OSError: The file cannot be read.
        """
        uploaded = await self._upload(source, filename, content_type)
        return uploaded.url

    async def _upload(
        self, source: Source, filename: str | None = None, content_type: str | None = None
    ) -> UploadedFile:
        with open_upload(source) as upload:
            arguments = upload.arguments(filename, content_type)

            async def send(request: Request) -> httpx.Response:
                upload.rewind()
                content = chunks_of(upload)
                return await self._http.post(
                    request.path, content=content, timeout=self._timeout, **arguments
                )

            return await self._run(self._api.upload(repeatable=upload.repeatable), send)

    async def submit(
        self,
        task_type: str,
        *,
        task_id: str | None = None,
        options: Mapping[str, JsonValue] | None = None,
        priority: Priority = "normal",
        callback_url: str | None = None,
        callback_events: Sequence[CallbackEvent] | None = None,
        expires_at: datetime | str | None = None,
        time_limit: float | None = None,
        batch_id: str | None = None,
        metadata: Mapping[str, JsonValue] | None = None,
        wait: float | None = None,
        **inputs: JsonValue,
    ) -> TaskStatus:
        """Submit a task. When this returns, the task is accepted and will not be lost.

        Args:
            task_type: The name of the task type, such as `ocr`.
            task_id: The task's id. The same id with the same content is the same task, so a repeat is harmless.
                Default: a new id.
            options: The options of the task type.
            priority: `high`, `normal` or `low`.
            callback_url: The address that receives webhooks about this task.
            callback_events: Which of `started`, `progress` and `completed` are sent there. Default: `completed`.
            expires_at: The task is not started after this time. A text is ISO 8601 with an offset.
            time_limit: Seconds that one run of the task may take. Default: the task type's limit.
            batch_id: An id that several tasks share, for `list`.
            metadata: Data of your own, returned with the result.
            wait: Seconds to wait for the task's end. The status returned then may be the final one.
            inputs: The inputs of the task type, such as `image_url` or `text`.

        Raises:
            InvalidRequest: A field is wrong; `errors` names it.
            Conflict: Another task with other content has this id.
        """
        fields = {
            "task_id": task_id or new_task_id(),
            "task_type": task_type,
            "options": options,
            "priority": priority,
            "callback_url": callback_url,
            "callback_events": callback_events,
            "expires_at": expires_at,
            "time_limit": time_limit,
            "batch_id": batch_id,
            "metadata": metadata,
        }
        return await self._run(self._api.submit(fields, inputs, wait))

    async def status(self, task_id: str) -> TaskStatus:
        """Return the task's present status.

        Raises:
            NotFound: There is no such task.
        """
        return await self._run(self._api.status(task_id))

    async def result(self, task_id: str, wait: float | None = None) -> Result:
        """Return the result of a task that has ended, whether it succeeded or not.

        Args:
            task_id: The task's id.
            wait: Seconds to wait for the task's end. Default: do not wait.

        Raises:
            NotEnded: The task has not ended yet.
            NotFound: There is no such task.
        """
        return await self._run(self._api.result(task_id, wait))

    async def wait(self, task_id: str, timeout: float | None = None) -> TaskStatus:
        """Wait for the task's end and return its final status.

        Args:
            task_id: The task's id.
            timeout: Seconds to wait. Default: no limit.

        Raises:
            NotEnded: The task has not ended after `timeout` seconds.
            NotFound: There is no such task.
        """
        return await self._run(self._api.wait(task_id, timeout))

    async def cancel(self, task_id: str) -> TaskStatus:
        """Request the task's cancellation. A task that is running stops a little later.

        Raises:
            Conflict: The task has ended in another way.
            NotFound: There is no such task.
        """
        return await self._run(self._api.cancel(task_id))

    async def callbacks(self, subject_id: str, *, kind: SubjectKind = "task") -> Sequence[CallbackRecord]:
        """Return the callbacks of a task, with each attempt to deliver them.

        Args:
            subject_id: The id of the task or batch.
            kind: `task` or `batch`.

        Raises:
            NotFound: There is no such task or batch.
        """
        return await self._run(self._api.callbacks(subject_id, kind))

    async def resend(
        self, subject_id: str, callback_id: str | None = None, *, kind: SubjectKind = "task"
    ) -> Sequence[CallbackRecord]:
        """Send a callback again, with the same `webhook-id`, and return the records of what is sent.

        Args:
            subject_id: The id of the task or batch.
            callback_id: The callback's id. Default: all callbacks of the task or batch that failed.
            kind: `task` or `batch`.

        Raises:
            NotFound: There is no such task, batch or callback.
        """
        return await self._run(self._api.resend(subject_id, callback_id, kind))

    async def failed_callbacks(self, limit: int = 50) -> Sequence[CallbackRecord]:
        """Return the callbacks that could not be delivered, the newest first.

        Args:
            limit: How many to return, at most 200.
        """
        return await self._run(self._api.failed_callbacks(limit))

    async def list(
        self,
        *,
        task_type: str | None = None,
        status: State | None = None,
        batch_id: str | None = None,
        page_size: int = 100,
    ) -> AsyncIterator[TaskStatus]:
        """Iterate over the tasks, the newest first. Each page is requested when it is needed.

        Args:
            task_type: Only tasks of this type.
            status: Only tasks in this state, such as `failed`.
            batch_id: Only tasks with this batch id.
            page_size: How many tasks one request returns, at most 200.
        """
        filters = {"task_type": task_type, "status": status, "batch_id": batch_id, "limit": page_size}
        cursor = None
        while True:
            page = await self._run(self._api.tasks(filters, cursor))
            for task in page.items:
                yield task
            if (cursor := page.cursor) is None:
                return

    async def events(self, task_id: str) -> AsyncIterator[Event]:
        """Iterate over the task's events: its present state first, then each change until its end.

        A lost connection is made again. Each event is given once; progress in between can be missed.

        Raises:
            NotFound: There is no such task.
        """
        stream = EventStream(task_id, self._api.retries)
        while True:
            try:
                async with self._http.stream(**stream.connect(self._timeout)) as response:
                    if not response.is_success:
                        await response.aread()
                        stream.failed(response)
                    else:
                        async for chunk in response.aiter_raw():
                            for event in stream.feed(chunk):
                                yield event
                            if stream.ended:
                                return
            except httpx.TransportError as error:
                stream.failed(error)
            await sleep(stream.pause)

    async def download(self, task_id: str, name: str, path: str | os.PathLike[str]) -> Path:
        """Download an artifact of a task, and return the path of the file.

        The file appears when it is complete and its SHA-256 is right. It replaces an older file.

        Args:
            task_id: The task's id.
            name: The artifact's name, as in `Result.artifacts`.
            path: The file to write, or an existing folder to write it into under the artifact's name.

        Raises:
            NotFound: There is no such task or artifact.
            OSError: The file cannot be written.
        """
        return await self._download(artifact_path(task_id, name), target_path(path, name))

    async def _download(self, url_path: str, file: Path) -> Path:
        async def fetch(request: Request) -> httpx.Response:
            async with self._http.stream(**request.arguments(self._timeout)) as response:
                if not response.is_success:
                    await response.aread()
                    return response
                with new_file(file) as part:
                    async for chunk in response.aiter_bytes(CHUNK_BYTES):
                        await write_chunk(part, chunk)
                    part.check(response)
                return response

        await self._run(self._api.request(Request("GET", url_path)), fetch)
        return file

    async def submit_batch(
        self,
        source: Source,
        *,
        batch_id: str | None = None,
        task_type: str | None = None,
        defaults: Mapping[str, JsonValue] | None = None,
        priority: Priority = "normal",
        max_in_flight: int | None = None,
        callback_url: str | None = None,
        window: Mapping[str, JsonValue] | None = None,
        metadata: Mapping[str, JsonValue] | None = None,
    ) -> BatchStatus:
        """Submit a batch: a JSONL file with one task per line. When this returns, the batch is accepted.

        Args:
            source: An `inferq:` URL, an `s3://` URL of a file or a prefix, or a file to upload: a path, its
                content as bytes, or an open binary file.
            batch_id: The batch's id. The same id with the same content is the same batch, so a repeat is
                harmless. Default: a new id.
            task_type: The task type of lines that name none.
            defaults: Fields of a task for lines that do not have them.
            priority: `high`, `normal` or `low`.
            max_in_flight: How many of its tasks may be queued or running at once.
            callback_url: The address that receives a webhook at the batch's end.
            window: The hours in which its tasks are queued: `start` and `end` (such as `22:00`), and `time_zone`
                (an IANA name; default `UTC`). Default: any time.
            metadata: Data of your own, returned with the status.

        Raises:
            InvalidRequest: A field is wrong; `errors` names it.
            Conflict: Another batch with other content has this id.
            OSError: The file cannot be read.
        """
        fields: dict[str, object] = {
            "batch_id": batch_id or new_task_id(),
            "task_type": task_type,
            "defaults": defaults,
            "priority": priority,
            "max_in_flight": max_in_flight,
            "callback_url": callback_url,
            "window": window,
            "metadata": metadata,
        }
        if is_batch_url(source):
            fields["source"] = source
        else:
            uploaded = await self._upload(source)
            fields |= {"source": uploaded.url, "source_sha256": uploaded.sha256}
        return await self._run(self._api.submit_batch(fields))

    async def batch(self, batch_id: str) -> BatchStatus:
        """Return the batch's present status.

        Raises:
            NotFound: There is no such batch.
        """
        return await self._run(self._api.batch(batch_id))

    async def wait_batch(self, batch_id: str, timeout: float | None = None) -> BatchStatus:
        """Wait for the batch's end and return its final status.

        Args:
            batch_id: The batch's id.
            timeout: Seconds to wait. Default: no limit.

        Raises:
            NotEnded: The batch has not ended after `timeout` seconds.
            NotFound: There is no such batch.
        """
        return await self._run(self._api.wait_batch(batch_id, timeout))

    async def cancel_batch(self, batch_id: str) -> BatchStatus:
        """Request the batch's cancellation, and that of its tasks.

        Raises:
            Conflict: The batch has ended in another way.
            NotFound: There is no such batch.
        """
        return await self._run(self._api.cancel_batch(batch_id))

    async def batches(self, *, page_size: int = 50) -> AsyncIterator[BatchStatus]:
        """Iterate over the batches, the newest first. Each page is requested when it is needed.

        Args:
            page_size: How many batches one request returns, at most 200.
        """
        cursor = None
        while True:
            page = await self._run(self._api.batches(page_size, cursor))
            for batch in page.items:
                yield batch
            if (cursor := page.cursor) is None:
                return

    async def batch_file(
        self, batch_id: str, name: Literal["output", "errors"], path: str | os.PathLike[str]
    ) -> Path:
        """Download a batch's `output.jsonl` or `errors.jsonl`, and return the path of the file.

        Args:
            batch_id: The batch's id.
            name: `output` for the results of tasks that succeeded, `errors` for all other lines.
            path: The file to write, or an existing folder to write it into.

        Raises:
            NotEnded: The batch has not ended yet.
            NotFound: There is no such batch.
            OSError: The file cannot be written.
        """
        return await self._download(f"{batch_path(batch_id)}/{name}", target_path(path, f"{name}.jsonl"))

    async def stats(self) -> Stats:
        """Return the figures of queues, batches, nights and callbacks, as `inferq monitor` last read them.

        An unknown figure is None; `unknown` says why. Names of nights are those of your tenant.
        """
        return await self._run(self._api.stats())

    async def demand(self, *, target_wait: float | None = None) -> Demand:
        """Return how many workers each task type needs now, from what waits and from measured seconds.

        `workers` of a type is None while it is unknown; `unknown` says why.

        Args:
            target_wait: Seconds within which every waiting task should start (default: 300).
        """
        return await self._run(self._api.demand(target_wait))

    async def workers(self) -> WorkerList:
        """Return the workers that are alive. `tasks` of each are those of your tenant; `in_hand` counts all."""
        return await self._run(self._api.workers())

    async def close(self) -> None:
        """Close the connections. The client cannot be used afterwards."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _run(
        self, flow: Flow[T], send: Callable[[Request], Awaitable[httpx.Response]] | None = None
    ) -> T:
        send = send or self._send
        reply: Reply | None = None
        while True:
            try:
                step = flow.send(reply)
            except StopIteration as done:
                result: T = done.value
                return result
            reply = None
            if isinstance(step, Sleep):
                await sleep(step.seconds)
                continue
            try:
                reply = await send(step)
            except httpx.TransportError as error:
                reply = error

    async def _send(self, request: Request) -> httpx.Response:
        return await self._http.request(**request.arguments(self._timeout))
