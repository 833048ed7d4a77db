"""The routes of files: uploads in, artifacts and signed objects out; all streamed, in constant memory."""

from __future__ import annotations

import mimetypes
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import PurePosixPath
from typing import Annotated
from urllib.parse import quote

from anyio import CancelScope
from fastapi import APIRouter, Query, Request
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel, ConfigDict
from python_multipart.multipart import parse_options_header

from inferq.producer.gateway.auth import Tenant
from inferq.producer.gateway.body import BodyFile, pieces
from inferq.producer.gateway.lookup import checked_id, find_result, find_status, unknown
from inferq.producer.gateway.multipart import FormFile
from inferq.producer.gateway.problems import Refused, not_found
from inferq.producer.gateway.services import Here, Services
from inferq.schemas import new_task_id
from inferq.storage.objects.local import LocalStore
from inferq.storage.objects.results import upload_key
from inferq.storage.objects.store import DEFAULT_TYPE, clean_type

_FORM_OVERHEAD = 64 * 1024
_EXTENSION = re.compile(r"\.[a-z0-9]{1,10}")
_SHOWN_INLINE = re.compile(
    r"(image/(png|jpeg|gif|webp|bmp|avif)|(audio|video)/[a-z0-9.+-]+|text/plain|application/json)\s*(;.*)?",
    re.IGNORECASE,
)
_SANDBOX = "default-src 'none'; sandbox"

router = APIRouter(prefix="/v1", tags=["files"])


class UploadedFile(BaseModel):
    """An upload. `url` is what to give as a task's input; it is good for this tenant only."""

    model_config = ConfigDict(frozen=True)

    url: str
    bytes: int
    sha256: str
    content_type: str


_UPLOAD_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"file": {"type": "string", "format": "binary"}},
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
    tenant: Tenant,
    services: Here,
    filename: Annotated[str, Query(max_length=1024)] = "",
) -> Response:
    """The body is the file itself, of any content type, or a form (`multipart/form-data`) with one file.

    `filename` only lends its extension, for engines that go by that.
    """
    settings = services.settings
    content_type, options = parse_options_header(request.headers.get("content-type", ""))
    limit = settings.max_upload_bytes
    if content_type == b"multipart/form-data":
        # The form around the file counts as well; the file's own limit is checked as it is taken out.
        body = pieces(request, limit=limit + _FORM_OVERHEAD, seconds=settings.body_timeout)
        async with aclosing(body) as stream:
            form = FormFile(stream, options.get(b"boundary", b""), limit=limit)
            await form.begin()
            stored = await store_upload(
                services, tenant, form.content(), form.content_type, form.filename or filename
            )
    else:
        body = pieces(request, limit=limit, seconds=settings.body_timeout)
        async with aclosing(body) as stream:
            stored = await store_upload(services, tenant, stream, content_type.decode("latin-1"), filename)
    return Response(stored.model_dump_json(), 201, {"Location": stored.url}, "application/json")


async def store_upload(
    services: Services, tenant: str, stream: AsyncIterator[bytes], content_type: str, filename: str
) -> UploadedFile:
    """Stream an upload into the object store."""
    guessed, _ = mimetypes.guess_type(PurePosixPath(filename).name)
    if content_type in ("", DEFAULT_TYPE, "application/x-www-form-urlencoded"):
        content_type = guessed or DEFAULT_TYPE
    content_type = clean_type(content_type)
    file_id = new_task_id() + _extension(filename, content_type)
    file = BodyFile(stream)
    try:
        await services.on_upload(
            services.store.put, upload_key(tenant, file_id), file.buffered(), content_type=content_type
        )
    except Exception:
        if file.error is not None:
            raise file.error  # noqa: B904 - the store's error is only what it made of this one
        raise
    services.metrics.uploaded_bytes.inc(file.bytes)
    return UploadedFile(
        url=f"inferq:{file_id}", bytes=file.bytes, sha256=file.sha256, content_type=content_type
    )


def _extension(filename: str, content_type: str) -> str:
    given = PurePosixPath(filename.lower()).suffix
    if _EXTENSION.fullmatch(given):
        return given
    return mimetypes.guess_extension(content_type) or ""


@router.get(
    "/tasks/{task_id}/artifacts/{name}",
    summary="A file that a task produced",
    response_class=StreamingResponse,
    responses={200: {"content": {"*/*": {}}, "description": "The file"}},
)
async def get_artifact(task_id: str, name: str, request: Request, tenant: Tenant, services: Here) -> Response:
    checked_id(task_id)
    result = await find_result(services, tenant, task_id)
    if result is None:
        status = await find_status(services, tenant, task_id)
        if status is None:
            raise unknown(task_id)
        raise not_found(f"artifact {name!r} of task {task_id!r}, which is {status.state},")
    artifact = next((found for found in result.artifacts if found.name == name), None)
    if artifact is None:
        raise not_found(f"artifact {name!r} of task {task_id!r}")
    etag = f'"{artifact.sha256}"'
    if etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers={"ETag": etag})
    key = services.results.artifact_key(tenant, task_id, name, result=result)
    headers = {"Content-Length": str(artifact.bytes), "ETag": etag}
    return await _download(services, key, name, artifact.content_type, headers)


@router.get(
    "/objects/{key:path}",
    summary="An object by a signed URL of the local-folder store",
    response_class=StreamingResponse,
    responses={200: {"content": {"*/*": {}}, "description": "The object"}},
)
async def get_signed(
    key: str,
    services: Here,
    expires: Annotated[int, Query(ge=0, le=1 << 53)],
    signature: Annotated[str, Query(max_length=128)],
) -> Response:
    """Open without an API key: the signature is the right to it."""
    store = services.store
    if not isinstance(store, LocalStore):
        raise not_found("a signed object here, as the object store signs its own URLs,")
    if not await services.on_store(store.verify, key, expires=expires, signature=signature):
        raise Refused(403, "bad_signature", "the signature does not fit this URL, or its time is over")
    info = await services.on_store(store.stat, key)
    headers = {"Content-Length": str(info.bytes), "ETag": f'"{info.etag}"'}
    return await _download(services, key, key.rpartition("/")[2], info.content_type, headers)


async def _download(
    services: Services, key: str, name: str, content_type: str, headers: dict[str, str]
) -> Response:
    content_type = clean_type(content_type)
    chunks = await services.on_store(services.store.stream, key)
    shown = "inline" if _SHOWN_INLINE.fullmatch(content_type) else "attachment"
    headers |= {
        "Content-Disposition": f"{shown}; filename*=UTF-8''{quote(name, safe='', errors='replace')}",
        # What an engine made of a stranger's input must never run as a page of this site.
        "Content-Security-Policy": _SANDBOX,
        "Content-Type": content_type,
        "Cache-Control": "private, max-age=3600",
    }
    return StreamingResponse(chunks_of(services, chunks), headers=headers)


async def chunks_of(services: Services, chunks: Iterator[bytes]) -> AsyncIterator[bytes]:
    """An object's pieces, each read on a thread."""
    try:
        while (chunk := await services.on_store(next, chunks, None)) is not None:
            yield chunk
    finally:
        close = getattr(chunks, "close", None)
        if close is not None:
            with CancelScope(shield=True):
                await services.on_store(close)
