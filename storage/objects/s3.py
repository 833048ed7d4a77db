"""The object store in S3 or a compatible service (MinIO, Ceph, ...)."""

from __future__ import annotations

import random
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import boto3
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from inferq.storage.objects.store import (
    CHUNK_BYTES,
    DEFAULT_TYPE,
    BadObjectKey,
    ObjectInfo,
    ObjectNotFound,
    ObjectStore,
    Pieces,
    StoreOutage,
    check_key,
    check_prefix,
    clean_type,
)

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_PART_BYTES = 8 << 20
_FILE = TransferConfig(multipart_threshold=_PART_BYTES, multipart_chunksize=_PART_BYTES, max_concurrency=4)
# With threads, boto3 reads ahead of the network and keeps up to ten parts of a stream in memory.
_STREAM = TransferConfig(multipart_threshold=_PART_BYTES, multipart_chunksize=_PART_BYTES, use_threads=False)
_CONFLICT_TRIES = 6
_ABSENT = {"NoSuchKey", "404", "NotFound"}


def s3_client(endpoint_url: str | None = None) -> S3Client:
    """A client with few retries and short timeouts. boto3 finds the credentials and the region."""
    session = boto3.Session()  # the default session is not thread-safe
    return session.client(
        "s3",
        endpoint_url=endpoint_url,
        region_name=session.region_name or "us-east-1",
        config=Config(
            signature_version="s3v4",
            connect_timeout=5,
            read_timeout=30,
            max_pool_connections=64,
            retries={"mode": "standard", "total_max_attempts": 3},
            s3={"addressing_style": "path" if endpoint_url else "auto"},
            # Many compatible services do not support the newer checksums.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        ),
    )


class S3Refused(StoreOutage):
    """S3 refuses these credentials, or the bucket does not exist."""


class S3Store(ObjectStore):
    """Objects in one bucket, below `prefix`."""

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        *,
        endpoint_url: str | None = None,
        client: S3Client | None = None,
    ) -> None:
        self.bucket = bucket
        self.prefix = "/".join(part for part in prefix.split("/") if part)
        self._base = f"{self.prefix}/" if self.prefix else ""
        self._endpoint_url = endpoint_url
        self._given = client
        self._lock = threading.Lock()
        if self._base:
            check_key(self.prefix)

    @property
    def _client(self) -> S3Client:
        # Created on first use, since that reads files, and by one thread only.
        if self._given is None:
            with self._lock:
                if self._given is None:
                    self._given = s3_client(self._endpoint_url)
        return self._given

    def put(
        self,
        key: str,
        data: bytes | BinaryIO | Path,
        *,
        content_type: str = DEFAULT_TYPE,
    ) -> ObjectInfo:
        name = self._name(key)
        content_type = clean_type(content_type)
        with self._calling(key):
            if isinstance(data, bytes):
                reply = self._client.put_object(
                    Bucket=self.bucket, Key=name, Body=data, ContentType=content_type
                )
                etag = reply["ETag"].strip('"')
                return ObjectInfo(key, len(data), content_type, datetime.now(UTC), etag)
        if isinstance(data, Path):
            with data.open("rb") as file:
                self._upload(key, file, content_type, _FILE)
        else:
            self._upload(key, _Filled(data), content_type, _STREAM)
        return self.stat(key)

    def _upload(self, key: str, source: Any, content_type: str, config: TransferConfig) -> None:
        with self._calling(key):
            self._client.upload_fileobj(
                source,
                self.bucket,
                self._name(key),
                ExtraArgs={"ContentType": content_type},
                Config=config,
            )

    def create(self, key: str, data: bytes, *, content_type: str) -> bool:
        with self._calling(key):
            return self._create(self._name(key), data, content_type)

    def _create(self, name: str, data: bytes, content_type: str) -> bool:
        writer = secrets.token_hex(8)
        tries = 0
        while True:
            try:
                self._client.put_object(
                    Bucket=self.bucket,
                    Key=name,
                    Body=data,
                    ContentType=clean_type(content_type),
                    Metadata={"inferq-writer": writer},
                    IfNoneMatch="*",
                )
                return True
            except ClientError as error:
                code = error.response["Error"]["Code"]
                if code in {"PreconditionFailed", "412"}:
                    return self._is_mine(error, name, writer)
                tries += 1
                # S3 reports a conflict during another conditional write of the key.
                if code not in {"ConditionalRequestConflict", "409"} or tries == _CONFLICT_TRIES:
                    raise
            time.sleep(random.uniform(0.02, 0.2))  # noqa: S311

    def _is_mine(self, error: ClientError, name: str, writer: str) -> bool:
        """Whether an earlier try of this call, whose response was lost, wrote the object."""
        if not error.response["ResponseMetadata"].get("RetryAttempts"):
            return False
        found = self._client.head_object(Bucket=self.bucket, Key=name)
        return found["Metadata"].get("inferq-writer") == writer

    def get(self, key: str) -> bytes:
        with self._calling(key):
            return self._client.get_object(Bucket=self.bucket, Key=self._name(key))["Body"].read()

    def stream(self, key: str, *, chunk_bytes: int = CHUNK_BYTES, start: int = 0) -> Pieces:
        if start and start >= self.stat(key).bytes:
            return _nothing()  # S3 refuses such a range
        return _opened(self._client, self.bucket, self._name(key), chunk_bytes, start)[1]

    def stat(self, key: str) -> ObjectInfo:
        with self._calling(key):
            found = self._client.head_object(Bucket=self.bucket, Key=self._name(key))
        return ObjectInfo(
            key=key,
            bytes=found["ContentLength"],
            content_type=found.get("ContentType") or DEFAULT_TYPE,
            modified=found["LastModified"],
            etag=found["ETag"].strip('"'),
        )

    def list(self, prefix: str = "", *, start_after: str = "") -> Iterator[ObjectInfo]:
        check_prefix(prefix)
        return self._listing(prefix, start_after)

    def _listing(self, prefix: str, start_after: str) -> Iterator[ObjectInfo]:
        with self._calling(prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=self._base + prefix, StartAfter=self._base + start_after
            )
            for page in pages:
                for found in page.get("Contents", ()):
                    key = found["Key"].removeprefix(self._base)
                    try:
                        check_key(key)
                    except BadObjectKey:
                        continue  # another program's object: not a valid key
                    yield ObjectInfo(key, found["Size"], "", found["LastModified"], found["ETag"].strip('"'))

    def delete(self, key: str) -> None:
        try:
            with self._calling(key):
                self._client.delete_object(Bucket=self.bucket, Key=self._name(key))
        except ObjectNotFound:
            return

    def location(self, key: str) -> str:
        return f"s3://{self.bucket}/{self._name(key)}"

    def ping(self) -> None:
        try:
            with self._calling(""):
                self._client.head_bucket(Bucket=self.bucket)
        except ObjectNotFound as error:
            raise S3Refused(_no_bucket(self.bucket)) from error

    def _name(self, key: str) -> str:
        return self._base + check_key(key)

    @contextmanager
    def _calling(self, key: str) -> Iterator[None]:
        with s3_errors(self.bucket, key):
            yield


def open_object(endpoint_url: str | None, bucket: str, key: str) -> tuple[ObjectInfo, Pieces]:
    """An object of any bucket and its pieces. Raises ObjectNotFound, S3Refused and StoreOutage."""
    return _opened(_shared_client(endpoint_url), bucket, key, CHUNK_BYTES)


_shared_client = cache(s3_client)


def list_bucket(endpoint_url: str | None, bucket: str, prefix: str) -> Iterator[ObjectInfo]:
    """The objects of any bucket whose keys begin with `prefix`. Raises S3Refused and StoreOutage."""
    with s3_errors(bucket, prefix):
        paginator = _shared_client(endpoint_url).get_paginator("list_objects_v2")
        for page in paginator.paginate(Bucket=bucket, Prefix=prefix):
            for found in page.get("Contents", ()):
                yield ObjectInfo(
                    found["Key"], found["Size"], "", found["LastModified"], found["ETag"].strip('"')
                )


def _nothing() -> Pieces:
    yield from ()


def _opened(
    client: S3Client, bucket: str, name: str, chunk_bytes: int, start: int = 0
) -> tuple[ObjectInfo, Pieces]:
    with s3_errors(bucket, name):
        found = (
            client.get_object(Bucket=bucket, Key=name, Range=f"bytes={start}-")
            if start
            else (client.get_object(Bucket=bucket, Key=name))
        )
    info = ObjectInfo(
        key=name,
        bytes=found["ContentLength"],
        content_type=found.get("ContentType") or DEFAULT_TYPE,
        modified=found["LastModified"],
        etag=found["ETag"].strip('"'),
    )
    chunks = _pieces(found["Body"], bucket, name, chunk_bytes)
    next(chunks)  # from here on, closing the generator releases the connection
    return info, chunks


def _pieces(body: Any, bucket: str, name: str, chunk_bytes: int) -> Pieces:
    with s3_errors(bucket, name), closing(body):
        yield b""
        yield from body.iter_chunks(chunk_bytes)


@contextmanager
def s3_errors(bucket: str, key: str) -> Iterator[None]:
    """Turns boto3's errors into ObjectNotFound for a missing key, else into StoreOutage."""
    try:
        yield
    except ClientError as error:
        raise _explained(error, bucket, key) from error
    except (BotoCoreError, Boto3Error) as error:
        raise StoreOutage(
            f"S3 cannot be used for bucket {bucket!r}: {error}; check INFERQ_S3_ENDPOINT_URL, the network "
            "and the credentials (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"
        ) from error


def _explained(error: ClientError, bucket: str, key: str) -> ObjectNotFound | StoreOutage:
    code = error.response["Error"]["Code"]
    status = error.response["ResponseMetadata"].get("HTTPStatusCode")
    if code == "NoSuchBucket":
        return S3Refused(_no_bucket(bucket))
    if code in _ABSENT or status == 404:
        return ObjectNotFound(f"there is no object {key!r}")
    if status in {401, 403}:
        return S3Refused(
            f"S3 refuses bucket {bucket!r} ({code}): the credentials need s3:GetObject, s3:PutObject, "
            "s3:DeleteObject and s3:ListBucket (without the last, what is missing looks forbidden)"
        )
    return StoreOutage(f"S3 answered {code} ({status}) for {key!r} in bucket {bucket!r}: {error}")


def _no_bucket(bucket: str) -> str:
    return f"S3 has no bucket {bucket!r}: create it, or correct INFERQ_STORE_URL"


class _Filled:
    """A stream with only `read`, which returns fewer bytes than requested only at the end.

    boto3 takes a short read for the end of a part, and rewinds a stream that can seek.
    """

    def __init__(self, source: BinaryIO) -> None:
        self._source = source

    def read(self, count: int = -1) -> bytes:
        pieces = []
        while count:
            piece = self._source.read(CHUNK_BYTES if count < 0 else min(count, CHUNK_BYTES))
            if not piece:
                break
            pieces.append(piece)
            count -= len(piece) if count > 0 else 0
        return b"".join(pieces)
