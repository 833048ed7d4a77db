"""The routes of files: uploads in, artifacts out; streamed in constant memory."""

from __future__ import annotations

import mimetypes
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, suppress
from functools import partial
from pathlib import PurePosixPath
from typing import Annotated, Any
from urllib.parse import quote

from anyio import CancelScope
from fastapi import Query, Request
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel, ConfigDict
from python_multipart.multipart import parse_options_header

from inferq.producer.gateway.auth import CurrentTenant
from inferq.producer.gateway.body import BodyFile, body_chunks
from inferq.producer.gateway.multipart import FormFile
from inferq.producer.gateway.problems import ProblemError, not_found
from inferq.producer.gateway.ranges import requested_part
from inferq.producer.gateway.routing import Router
from inferq.producer.gateway.services import Services, ServicesDep
from inferq.producer.gateway.task_lookup import checked_task_id, find_result, find_status, no_such_task
from inferq.schemas import new_task_id
from inferq.storage.objects.results import upload_key
from inferq.storage.objects.store import DEFAULT_TYPE, StoreOutage, clean_type

_FORM_OVERHEAD = 64 * 1024
_EXTENSION = re.compile(r"\.[a-z0-9]{1,10}")
_INLINE_TYPES = re.compile(
    r"(image/(png|jpeg|gif|webp|bmp|avif)|(audio|video)/[a-z0-9.+-]+|text/plain|application/json)\s*(;.*)?",
    re.IGNORECASE,
)
_SANDBOX = "default-src 'none'; sandbox"

router = Router(prefix="/v1", tags=["files"])


class UploadedFile(BaseModel):
    """An uploaded file. Use `url` as a task's input; it is valid for this tenant only."""

    model_config = ConfigDict(frozen=True)

    url: str
    bytes: int
    sha256: str
    content_type: str


class EmptyUpload(ProblemError):
    """The upload has no bytes."""


SENT_FILE = {"type": "string", "format": "binary", "minLength": 1}
"""The schema of a body that is a file, for the OpenAPI document. An empty one is refused."""

_UPLOAD_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/octet-stream": {"schema": SENT_FILE},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"file": SENT_FILE},
                    "required": ["file"],
                }
            },
        },
    }
}


@router.post(
    "/files",
    status_code=201,
    response_model=UploadedFile,
    summary="Upload a file",
    openapi_extra=_UPLOAD_BODY,
)
async def post_file(
    request: Request,
    tenant: CurrentTenant,
    services: ServicesDep,
    filename: Annotated[str, Query(max_length=1024)] = "",
) -> Response:
    """The body is the file itself, of any content type, or a form (`multipart/form-data`) with one file.

    The URL keeps the extension of `filename`, as some engines need it.
    """
    settings = services.settings
    content_type, options = parse_options_header(request.headers.get("content-type", ""))
    limit = settings.max_upload_bytes
    if content_type == b"multipart/form-data":
        # This limit includes the form around the file; FormFile checks the file's own.
        chunks = body_chunks(request, limit=limit + _FORM_OVERHEAD, seconds=settings.body_timeout)
        async with aclosing(chunks) as stream:
            form = FormFile(stream, options.get(b"boundary", b""), limit=limit)
            await form.begin()
            stored = await store_upload(
                services, tenant, form.content(), form.content_type, form.filename or filename
            )
    else:
        chunks = body_chunks(request, limit=limit, seconds=settings.body_timeout)
        async with aclosing(chunks) as stream:
            stored = await store_upload(services, tenant, stream, content_type.decode("latin-1"), filename)
    return Response(stored.model_dump_json(), 201, {"Location": stored.url}, "application/json")


async def store_upload(
    services: Services, tenant: str, stream: AsyncIterator[bytes], content_type: str, filename: str
) -> UploadedFile:
    """Stream an upload into the object store. Raises ProblemError (422) if it is empty."""
    guessed, _ = mimetypes.guess_type(PurePosixPath(filename).name)
    if content_type in ("", DEFAULT_TYPE, "application/x-www-form-urlencoded"):
        content_type = guessed or DEFAULT_TYPE
    content_type = clean_type(content_type)
    file_id = new_task_id() + _extension(filename, content_type)
    first = await anext(stream, b"")
    if not first:
        raise EmptyUpload(422, "empty_file", "the file is empty; send its content as the body")
    file = BodyFile(stream, first)
    try:
        key = upload_key(tenant, file_id)
        await services.on_upload(
            tenant, partial(services.store.put, key, file.buffered(), content_type=content_type)
        )
    except Exception:
        if file.error is not None:
            raise file.error  # noqa: B904 - the store only wraps this error
        raise
    services.metrics.uploaded_bytes.inc(file.bytes)
    return UploadedFile(
        url=f"inferq:{file_id}", bytes=file.bytes, sha256=file.sha256, content_type=content_type
    )


def as_file(*content_types: str) -> dict[str, Any]:
    """The arguments of a route that answers with a file, for the OpenAPI document."""
    file = {"content": {name: {"schema": {"type": "string", "format": "binary"}} for name in content_types}}
    return {
        "response_class": StreamingResponse,
        "responses": {
            200: {"description": "The file", **file},
            206: {"description": "The part of the file that the header Range asks for", **file},
        },
    }


def _extension(filename: str, content_type: str) -> str:
    given = PurePosixPath(filename.lower()).suffix
    if _EXTENSION.fullmatch(given):
        return given
    return mimetypes.guess_extension(content_type) or ""


@router.get(
    "/tasks/{task_id}/artifacts/{name}",
    summary="Download an artifact of a task",
    # Generators of clients cannot read a range of types alone.
    **as_file(DEFAULT_TYPE, "*/*"),
)
async def get_artifact(
    task_id: str, name: str, request: Request, tenant: CurrentTenant, services: ServicesDep
) -> Response:
    """`name` is one of the names in the result's `artifacts`."""
    checked_task_id(task_id)
    result = await find_result(services, tenant, task_id)
    if result is None:
        status = await find_status(services, tenant, task_id)
        if status is None:
            raise no_such_task(task_id)
        raise not_found(f"artifact {name!r} of task {task_id!r} ({status.state})")
    artifact = next((found for found in result.artifacts if found.name == name), None)
    if artifact is None:
        raise not_found(f"artifact {name!r} of task {task_id!r}")
    etag = f'"{artifact.sha256}"'
    key = services.results.artifact_key(tenant, task_id, name, result=result)
    content_type = clean_type(artifact.content_type)
    disposition = "inline" if _INLINE_TYPES.fullmatch(content_type) else "attachment"
    headers = {
        "Content-Disposition": f"{disposition}; filename*=UTF-8''{quote(name, safe='', errors='replace')}",
        # An artifact made from untrusted input must not run as a page of this site.
        "Content-Security-Policy": _SANDBOX,
        "Content-Type": content_type,
        "Cache-Control": "private, max-age=3600",
    }
    return await download(request, services, key, size=artifact.bytes, etag=etag, headers=headers)


async def download(
    request: Request, services: Services, key: str, *, size: int, etag: str, headers: dict[str, str]
) -> Response:
    """Answer with an object of `size` bytes, or with the part that the request asks for; nothing to HEAD.

    Raises ProblemError (416), ObjectNotFound and StoreOutage.
    """
    if etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers={"ETag": etag})
    part = requested_part(request, size=size, etag=etag)
    headers |= part.headers
    if request.method == "HEAD":
        await services.on_store(services.store.stat, key)
        return Response(headers=headers)
    chunks = await services.on_store(services.store.stream, key, start=part.bytes.start)
    return StreamingResponse(_chunks_of(services, chunks, len(part.bytes)), part.status, headers)


async def _chunks_of(services: Services, chunks: Iterator[bytes], left: int) -> AsyncIterator[bytes]:
    """The first `left` bytes of an object's chunks, each read on a thread."""
    try:
        while left > 0 and (chunk := await services.on_store(next, chunks, None)) is not None:
            yield chunk[:left]
            left -= len(chunk)
    finally:
        close = getattr(chunks, "close", None)
        if close is not None:
            # A read that was abandoned still runs: then the object is closed once nothing refers to it.
            with CancelScope(shield=True), suppress(ValueError, StoreOutage):
                await services.on_store(close)
