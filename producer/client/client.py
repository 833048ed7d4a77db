"""A Python client of the gateway: `Client`, and `AsyncClient` with the same methods to be awaited.

    with Client() as inferq:
        page = inferq.upload("page.png")
        task = inferq.submit("ocr", image_url=page, wait=30)
        print(inferq.result(task.task_id).output)

Errors:

    inferq.schemas.InferqError
    └── ApiError              the gateway's problem: `status`, `code`, `title`, `detail`, `errors`
        ├── InvalidRequest    400, 413, 422: what was sent is wrong
        ├── Unauthorized      401, 403: no key, an unknown one, or another tenant's
        ├── NotFound          404: no such task, artifact or file
        ├── Conflict          409: the id belongs to another task, or the task is past that
        │   └── NotEnded      it has no result yet, or did not end within the time given
        └── Unavailable       429, 502, 503, 504, or nothing answered at all, however often it was tried

What fails for want of a connection, or as Unavailable, is tried again, with growing pauses or after the time
that the gateway names; every call may be repeated without harm.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from ipaddress import ip_address
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import anyio
import httpx
from anyio import to_thread
from pydantic import JsonValue

from inferq.producer.client.requests import (
    ApiError,
    Conflict,
    Flow,
    Flows,
    Following,
    InvalidRequest,
    NotEnded,
    NotFound,
    Outcome,
    Send,
    Sleep,
    Unauthorized,
    Unavailable,
    Uploaded,
    artifact_path,
    batch_body,
    batch_path,
    parsed,
    task_body,
)
from inferq.producer.client.settings import ClientSettings
from inferq.producer.client.transfers import (
    CHUNK_BYTES,
    Source,
    Upload,
    is_batch_url,
    opened,
    target,
    whole_file,
)
from inferq.schemas import (
    BatchStatus,
    CallbackEvent,
    CallbackRecord,
    Event,
    InstallationError,
    Priority,
    Result,
    State,
    SubjectKind,
    TaskStatus,
    new_task_id,
)

__all__ = [
    "ApiError",
    "AsyncClient",
    "Client",
    "Conflict",
    "InvalidRequest",
    "NotEnded",
    "NotFound",
    "Unauthorized",
    "Unavailable",
]

T = TypeVar("T")

_KEY = re.compile(r"[!-~]+")
"""What a header can carry as a bearer's token, in one word."""


class Client:
    """The gateway, for ordinary code. Safe to use from many threads.

    `api_url` and `api_key` default to the settings INFERQ_API_URL and INFERQ_API_KEY. `timeout` is in seconds
    and counts for each request, on top of what it is asked to wait. `transport` replaces the network.
    """

    def __init__(
        self,
        api_url: str | None = None,
        api_key: str | None = None,
        *,
        timeout: float = 30.0,
        retries: int = 4,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._http = httpx.Client(**_connection(api_url, api_key), transport=transport)
        self._timeout = timeout
        self._flows = Flows(retries)

    def upload(self, source: Source, *, filename: str | None = None, content_type: str | None = None) -> str:
        """Send a file (a path, bytes, or an open binary file) and give the `inferq:` URL to use as an input.

        It is streamed. `filename` only lends its extension; a path's own is the default.
        """
        return self._upload(source, filename=filename, content_type=content_type).url

    def _upload(
        self, source: Source, *, filename: str | None = None, content_type: str | None = None
    ) -> Uploaded:
        with opened(source) as upload:
            described = upload.described(filename, content_type)

            def send(_: Send) -> httpx.Response:
                upload.rewind()
                content = iter(upload.read, b"")
                return self._http.post("/v1/files", content=content, timeout=self._timeout, **described)

            request = self._flows.request(Send("POST", "/v1/files"), repeatable=upload.repeatable)
            return parsed(Uploaded, self._run(request, send))

    def submit(
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
        """Submit a task: once this returns it is accepted. `wait` waits up to that many seconds for its end.

        The id is made here where none is given, so that a repeat after a lost answer is the same task.
        """
        body = task_body(
            task_id or new_task_id(),
            task_type,
            inputs,
            options=options,
            priority=priority,
            callback_url=callback_url,
            callback_events=callback_events,
            expires_at=expires_at,
            time_limit=time_limit,
            batch_id=batch_id,
            metadata=metadata,
        )
        return self._run(self._flows.submit(body, wait))

    def status(self, task_id: str) -> TaskStatus:
        """Where the task stands."""
        return self._run(self._flows.status(task_id))

    def result(self, task_id: str, wait: float | None = None) -> Result:
        """How the task ended. Raises NotEnded where it has not, after waiting up to `wait` seconds for it."""
        return self._run(self._flows.result(task_id, wait))

    def wait(self, task_id: str, timeout: float | None = None) -> TaskStatus:
        """Wait for the task's end. Raises NotEnded after `timeout` seconds."""
        return self._run(self._flows.wait(task_id, timeout))

    def cancel(self, task_id: str) -> TaskStatus:
        """Ask for the task to be cancelled. Raises Conflict where it has ended otherwise."""
        return self._run(self._flows.cancel(task_id))

    def callbacks(self, subject_id: str, *, kind: SubjectKind = "task") -> Sequence[CallbackRecord]:
        """What became of the callbacks of a task (or batch, by its id and `kind`), attempt by attempt."""
        return self._run(self._flows.callbacks(subject_id, kind)).items

    def resend(
        self, subject_id: str, callback_id: str | None = None, *, kind: SubjectKind = "task"
    ) -> Sequence[CallbackRecord]:
        """Have a callback sent again, under its `webhook-id`; without a callback's id, all that failed."""
        return self._run(self._flows.resend(subject_id, callback_id, kind)).items

    def failed_callbacks(self, limit: int = 50) -> Sequence[CallbackRecord]:
        """The callbacks that were given up, the newest first, as far as the index keeps them."""
        return self._run(self._flows.failed_callbacks(limit)).items

    def list(
        self,
        *,
        task_type: str | None = None,
        status: State | None = None,
        batch_id: str | None = None,
        page_size: int = 100,
    ) -> Iterator[TaskStatus]:
        """Tasks, the newest first; further pages are fetched as they are needed."""
        filters = {"task_type": task_type, "status": status, "batch_id": batch_id, "limit": page_size}
        cursor = None
        while True:
            page = self._run(self._flows.page(filters, cursor))
            yield from page.items
            if (cursor := page.cursor) is None:
                return

    def events(self, task_id: str) -> Iterator[Event]:
        """Where the task stands, then every event until its end; connects again where it is cut off."""
        following = Following(task_id, self._flows.retries)
        while True:
            try:
                with self._http.stream(**following.arguments(self._timeout)) as response:
                    if not response.is_success:
                        response.read()
                        following.failed(response)
                    else:
                        for chunk in response.iter_raw():
                            yield from following.news(chunk)
                            if following.ended:
                                return
            except httpx.TransportError as error:
                following.failed(error)
            time.sleep(following.pause())

    def download(self, task_id: str, name: str, path: str | os.PathLike[str]) -> Path:
        """Get an artifact into a file, or under its name into a folder. It appears whole or not at all."""
        return self._download(artifact_path(task_id, name), target(path, name))

    def _download(self, url_path: str, file: Path) -> Path:
        def fetch(send: Send) -> httpx.Response:
            with self._http.stream(**send.arguments(self._timeout)) as response:
                if not response.is_success:
                    response.read()
                    return response
                with whole_file(file) as part:
                    for chunk in response.iter_bytes(CHUNK_BYTES):
                        part.write(chunk)
                    part.check(response)
                return response

        self._run(self._flows.request(Send("GET", url_path)), fetch)
        return file

    def submit_batch(
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
        """Submit a batch: once this returns it is accepted.

        `source` is `inferq:…` or `s3://…`, or else a JSONL (a path, bytes, or an open binary file), which is
        uploaded. The id is made here where none is given, so that a repeat is the same batch.
        """
        said = {
            "task_type": task_type,
            "defaults": dict(defaults) if defaults is not None else None,
            "priority": priority,
            "max_in_flight": max_in_flight,
            "callback_url": callback_url,
            "window": dict(window) if window is not None else None,
            "metadata": dict(metadata) if metadata is not None else None,
        }
        where = source if is_batch_url(source) else self._upload(source)
        return self._run(self._flows.submit_batch(batch_body(where, batch_id or new_task_id(), said)))

    def batch(self, batch_id: str) -> BatchStatus:
        """Where the batch stands."""
        return self._run(self._flows.batch(batch_id))

    def wait_batch(self, batch_id: str, timeout: float | None = None) -> BatchStatus:
        """Wait for the batch's end. Raises NotEnded after `timeout` seconds."""
        return self._run(self._flows.wait_batch(batch_id, timeout))

    def cancel_batch(self, batch_id: str) -> BatchStatus:
        """Ask for the batch to be cancelled. Raises Conflict where it has ended otherwise."""
        return self._run(self._flows.cancel_batch(batch_id))

    def batches(self, *, page_size: int = 50) -> Iterator[BatchStatus]:
        """Batches, the newest first; further pages are fetched as they are needed."""
        cursor = None
        while True:
            page = self._run(self._flows.batch_page(page_size, cursor))
            yield from page.items
            if (cursor := page.cursor) is None:
                return

    def batch_file(
        self, batch_id: str, name: Literal["output", "errors"], path: str | os.PathLike[str]
    ) -> Path:
        """Get `output.jsonl` or `errors.jsonl` into a file, or into a folder. Raises NotEnded."""
        return self._download(f"{batch_path(batch_id)}/{name}", target(path, f"{name}.jsonl"))

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, flow: Flow[T], send: Callable[[Send], httpx.Response] | None = None) -> T:
        send = send or self._send
        outcome: Outcome = None
        while True:
            try:
                step = flow.send(outcome)
            except StopIteration as done:
                result: T = done.value
                return result
            outcome = None
            if isinstance(step, Sleep):
                time.sleep(step.seconds)
                continue
            try:
                outcome = send(step)
            except httpx.TransportError as error:
                outcome = error

    def _send(self, send: Send) -> httpx.Response:
        return self._http.request(**send.arguments(self._timeout))


class AsyncClient:
    """The gateway, for asynchronous code (asyncio or trio). Everything else is as `Client` has it."""

    def __init__(
        self,
        api_url: str | None = None,
        api_key: str | None = None,
        *,
        timeout: float = 30.0,
        retries: int = 4,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._http = httpx.AsyncClient(**_connection(api_url, api_key), transport=transport)
        self._timeout = timeout
        self._flows = Flows(retries)

    async def upload(
        self, source: Source, *, filename: str | None = None, content_type: str | None = None
    ) -> str:
        """See Client.upload."""
        return (await self._upload(source, filename=filename, content_type=content_type)).url

    async def _upload(
        self, source: Source, *, filename: str | None = None, content_type: str | None = None
    ) -> Uploaded:
        with opened(source) as upload:
            described = upload.described(filename, content_type)

            async def send(_: Send) -> httpx.Response:
                upload.rewind()
                content = _read_async(upload)
                return await self._http.post("/v1/files", content=content, timeout=self._timeout, **described)

            request = self._flows.request(Send("POST", "/v1/files"), repeatable=upload.repeatable)
            return parsed(Uploaded, await self._run(request, send))

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
        """See Client.submit."""
        body = task_body(
            task_id or new_task_id(),
            task_type,
            inputs,
            options=options,
            priority=priority,
            callback_url=callback_url,
            callback_events=callback_events,
            expires_at=expires_at,
            time_limit=time_limit,
            batch_id=batch_id,
            metadata=metadata,
        )
        return await self._run(self._flows.submit(body, wait))

    async def status(self, task_id: str) -> TaskStatus:
        """See Client.status."""
        return await self._run(self._flows.status(task_id))

    async def result(self, task_id: str, wait: float | None = None) -> Result:
        """See Client.result."""
        return await self._run(self._flows.result(task_id, wait))

    async def wait(self, task_id: str, timeout: float | None = None) -> TaskStatus:
        """See Client.wait."""
        return await self._run(self._flows.wait(task_id, timeout))

    async def cancel(self, task_id: str) -> TaskStatus:
        """See Client.cancel."""
        return await self._run(self._flows.cancel(task_id))

    async def callbacks(self, subject_id: str, *, kind: SubjectKind = "task") -> Sequence[CallbackRecord]:
        """See Client.callbacks."""
        return (await self._run(self._flows.callbacks(subject_id, kind))).items

    async def resend(
        self, subject_id: str, callback_id: str | None = None, *, kind: SubjectKind = "task"
    ) -> Sequence[CallbackRecord]:
        """See Client.resend."""
        return (await self._run(self._flows.resend(subject_id, callback_id, kind))).items

    async def failed_callbacks(self, limit: int = 50) -> Sequence[CallbackRecord]:
        """See Client.failed_callbacks."""
        return (await self._run(self._flows.failed_callbacks(limit))).items

    async def list(
        self,
        *,
        task_type: str | None = None,
        status: State | None = None,
        batch_id: str | None = None,
        page_size: int = 100,
    ) -> AsyncIterator[TaskStatus]:
        """See Client.list."""
        filters = {"task_type": task_type, "status": status, "batch_id": batch_id, "limit": page_size}
        cursor = None
        while True:
            page = await self._run(self._flows.page(filters, cursor))
            for item in page.items:
                yield item
            if (cursor := page.cursor) is None:
                return

    async def events(self, task_id: str) -> AsyncIterator[Event]:
        """See Client.events."""
        following = Following(task_id, self._flows.retries)
        while True:
            try:
                async with self._http.stream(**following.arguments(self._timeout)) as response:
                    if not response.is_success:
                        await response.aread()
                        following.failed(response)
                    else:
                        async for chunk in response.aiter_raw():
                            for event in following.news(chunk):
                                yield event
                            if following.ended:
                                return
            except httpx.TransportError as error:
                following.failed(error)
            await anyio.sleep(following.pause())

    async def download(self, task_id: str, name: str, path: str | os.PathLike[str]) -> Path:
        """See Client.download."""
        return await self._download(artifact_path(task_id, name), target(path, name))

    async def _download(self, url_path: str, file: Path) -> Path:
        async def fetch(send: Send) -> httpx.Response:
            async with self._http.stream(**send.arguments(self._timeout)) as response:
                if not response.is_success:
                    await response.aread()
                    return response
                with whole_file(file) as part:
                    async for chunk in response.aiter_bytes(CHUNK_BYTES):
                        await to_thread.run_sync(part.write, chunk)
                    part.check(response)
                return response

        await self._run(self._flows.request(Send("GET", url_path)), fetch)
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
        """See Client.submit_batch."""
        said = {
            "task_type": task_type,
            "defaults": dict(defaults) if defaults is not None else None,
            "priority": priority,
            "max_in_flight": max_in_flight,
            "callback_url": callback_url,
            "window": dict(window) if window is not None else None,
            "metadata": dict(metadata) if metadata is not None else None,
        }
        where = source if is_batch_url(source) else await self._upload(source)
        return await self._run(self._flows.submit_batch(batch_body(where, batch_id or new_task_id(), said)))

    async def batch(self, batch_id: str) -> BatchStatus:
        """See Client.batch."""
        return await self._run(self._flows.batch(batch_id))

    async def wait_batch(self, batch_id: str, timeout: float | None = None) -> BatchStatus:
        """See Client.wait_batch."""
        return await self._run(self._flows.wait_batch(batch_id, timeout))

    async def cancel_batch(self, batch_id: str) -> BatchStatus:
        """See Client.cancel_batch."""
        return await self._run(self._flows.cancel_batch(batch_id))

    async def batches(self, *, page_size: int = 50) -> AsyncIterator[BatchStatus]:
        """See Client.batches."""
        cursor = None
        while True:
            page = await self._run(self._flows.batch_page(page_size, cursor))
            for item in page.items:
                yield item
            if (cursor := page.cursor) is None:
                return

    async def batch_file(
        self, batch_id: str, name: Literal["output", "errors"], path: str | os.PathLike[str]
    ) -> Path:
        """See Client.batch_file."""
        return await self._download(f"{batch_path(batch_id)}/{name}", target(path, f"{name}.jsonl"))

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _run(self, flow: Flow[T], send: Callable[[Send], Awaitable[httpx.Response]] | None = None) -> T:
        send = send or self._send
        outcome: Outcome = None
        while True:
            try:
                step = flow.send(outcome)
            except StopIteration as done:
                result: T = done.value
                return result
            outcome = None
            if isinstance(step, Sleep):
                await anyio.sleep(step.seconds)
                continue
            try:
                outcome = await send(step)
            except httpx.TransportError as error:
                outcome = error

    async def _send(self, send: Send) -> httpx.Response:
        return await self._http.request(**send.arguments(self._timeout))


async def _read_async(upload: Upload) -> AsyncIterator[bytes]:
    while chunk := await to_thread.run_sync(upload.read):
        yield chunk


def _connection(api_url: str | None, api_key: str | None) -> dict[str, Any]:
    """The arguments of httpx's clients that say where the gateway is, who asks, and over what connections."""
    settings = ClientSettings.load()
    key = api_key or (settings.api_key.get_secret_value() if settings.api_key is not None else None)
    if key and not _KEY.fullmatch(key):
        # It is not quoted: most of it may be the key.
        raise InstallationError(
            "INFERQ_API_KEY (or api_key) holds characters that no key has, such as blanks; copy it again",
            code="bad_settings",
        )
    url = _address(api_url or settings.api_url)
    return {
        "base_url": url,
        "headers": {"Authorization": f"Bearer {key}"} if key else {},
        # Whoever waits holds a connection. With a maximum, a few hundred waits would keep every other call
        # waiting for its turn, and then fail it as if the gateway were away.
        "limits": httpx.Limits(max_connections=None, max_keepalive_connections=100),
        # A proxy that the environment names would look for a loopback gateway on a machine of its own.
        "mounts": {f"all://{url.netloc.decode()}": None} if _is_loopback(url.host) else {},
    }


def _address(api_url: str) -> httpx.URL:
    with suppress(httpx.InvalidURL):
        url = httpx.URL(api_url)
        if url.scheme in ("http", "https") and url.host:
            return url
    # It is not quoted: it may hold a password.
    raise InstallationError(
        "INFERQ_API_URL (or api_url) cannot be read; give http://host:port or https://host",
        code="bad_settings",
    )


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
