"""The object store in S3 or a compatible service (MinIO, Ceph, ...)."""

from __future__ import annotations

import random
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache, cached_property, partial
from io import BytesIO
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import boto3
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    NoCredentialsError,
    PartialCredentialsError,
    TokenRetrievalError,
)

from inferq.storage.objects.store import (
    CHUNK_BYTES,
    DEFAULT_TYPE,
    RESERVED_FOLDER,
    BadObjectKey,
    ObjectInfo,
    ObjectNotFound,
    ObjectStore,
    Pieces,
    StoreOutage,
    StoreUnreachable,
    check_key,
    check_prefix,
    clean_type,
    side_by_side,
)

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import GetObjectOutputTypeDef, HeadObjectOutputTypeDef

T = TypeVar("T")

_PART_BYTES = 8 << 20
_FILE = TransferConfig(multipart_threshold=_PART_BYTES, multipart_chunksize=_PART_BYTES, max_concurrency=4)
# With threads, boto3 reads ahead of the network and keeps up to ten parts of a stream in memory.
_STREAM = TransferConfig(multipart_threshold=_PART_BYTES, multipart_chunksize=_PART_BYTES, use_threads=False)
_THREADS = 16
"""The most requests that one store makes side by side; its client has connections for four times as many."""
_SMALL_BYTES = 1 << 20
"""A body up to this size is sent without asking first, as almost every result is."""
_CONFLICT_TRIES = 6
_PAGE_KEYS = 1000
"""The most keys in one answer to a listing."""
_PROOF = "written-once"
_PROOF_SECONDS = 30.0
"""How long a proof that S3 writes is valid. Not for ever: credentials and servers change."""

_NO_CREDENTIALS = (
    NoCredentialsError,
    PartialCredentialsError,
    CredentialRetrievalError,
    TokenRetrievalError,
)
_CREDENTIAL_FAULTS = {
    "AuthorizationHeaderMalformed",
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidToken",
    "RequestExpired",
    "RequestTimeTooSkewed",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
}
"""https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html"""


def s3_client(endpoint_url: str | None = None) -> S3Client:
    """A client with few retries and short timeouts. boto3 finds the credentials and the region."""
    session = boto3.Session()  # the default session is not thread-safe
    client = session.client(
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
    client.meta.events.register_last("before-call.s3.PutObject", _send_at_once)
    return client


def _send_at_once(params: dict[str, Any], **_: object) -> None:
    """boto3 asks whether a body may come before it sends it. For a small one that costs more than a refusal."""
    body = params.get("body")
    if isinstance(body, BytesIO) and body.getbuffer().nbytes <= _SMALL_BYTES:
        params["headers"].pop("Expect", None)


class S3Refused(StoreOutage):
    """The credentials are valid, and may not do this in the bucket."""


class BucketNotFound(StoreOutage):
    """S3 has no such bucket."""


class CredentialsRefused(StoreOutage):
    """S3 refuses this machine's credentials or clock, whatever it asks for. No object and no task is at fault."""


class S3Store(ObjectStore):
    """Objects in one bucket, below `prefix`."""

    remote = True

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        *,
        endpoint_url: str | None = None,
        client: S3Client | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.bucket = bucket
        self.prefix = "/".join(part for part in prefix.split("/") if part)
        self._base = f"{self.prefix}/" if self.prefix else ""
        self._endpoint_url = endpoint_url
        self._given = client
        self._clock = clock
        self._lock = threading.Lock()
        self._proven_until = 0.0
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
        try:
            return self.stat(key)
        except ObjectNotFound as error:
            raise StoreOutage(f"S3 stored {key!r} in bucket {self.bucket!r}, and then lacked it") from error

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

    def create_many(self, items: Sequence[tuple[str, bytes]], *, content_type: str) -> Sequence[bool]:
        places: dict[str, list[int]] = {}
        for place, (key, _) in enumerate(items):
            places.setdefault(check_key(key), []).append(place)

        def create(key: str) -> Sequence[tuple[int, bool]]:
            # A key's own data come one after the other: the first wins.
            return [(place, self.create(*items[place], content_type=content_type)) for place in places[key]]

        created = dict(chain.from_iterable(self.side_by_side([partial(create, key) for key in places])))
        return [created[place] for place in range(len(items))]

    def side_by_side(self, calls: Sequence[Callable[[], T]]) -> Sequence[T]:
        return side_by_side(self._threads, calls)

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(_THREADS, thread_name_prefix="S3")

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
                code = _code(error)
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
        with self._calling(key, may_be_absent=True):
            return self._client.get_object(Bucket=self.bucket, Key=self._name(key))["Body"].read()

    def stream(self, key: str, *, chunk_bytes: int = CHUNK_BYTES, start: int = 0) -> Pieces:
        if start and start >= self.stat(key).bytes:
            return _nothing()  # S3 refuses such a range
        return _opened(self._client, self.bucket, self._name(key), chunk_bytes, start)[1]

    def stat(self, key: str) -> ObjectInfo:
        name = self._name(key)
        with self._calling(key):
            try:
                return _info(key, self._client.head_object(Bucket=self.bucket, Key=name))
            except ClientError as error:
                if _status(error) >= 500:
                    raise
        # An answer to HEAD has no body: a proxy's 404 looks like S3's. The answer to GET has S3's error code.
        found, chunks = _opened(self._client, self.bucket, name, CHUNK_BYTES)
        chunks.close()
        return replace(found, key=key)

    def list(
        self, prefix: str = "", *, start_after: str = "", limit: int | None = None
    ) -> Iterator[ObjectInfo]:
        check_prefix(prefix)
        # islice() stops at the limit without asking for another page.
        return islice(self._listing(prefix, start_after, limit or _PAGE_KEYS), limit)

    def _listing(self, prefix: str, start_after: str, page_keys: int) -> Iterator[ObjectInfo]:
        with self._calling(prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket,
                Prefix=self._base + prefix,
                StartAfter=self._base + start_after,
                PaginationConfig={"PageSize": min(page_keys, _PAGE_KEYS)},
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
            with self._calling(key, may_be_absent=True):
                self._client.delete_object(Bucket=self.bucket, Key=self._name(key))
        except ObjectNotFound:
            return

    def location(self, key: str) -> str:
        return f"s3://{self.bucket}/{self._name(key)}"

    def ping(self) -> None:
        """As in ObjectStore; also proves that S3 writes, and that it refuses a second conditional write.

        The code is `store_refused` if the credentials do not suffice, `store_overwrites` if S3 replaced an object
        that it was to create once.
        """
        try:
            with self._calling(_PROOF):
                if self._clock() < self._proven_until:
                    self._client.list_objects_v2(
                        Bucket=self.bucket, Prefix=f"{self._base}{RESERVED_FOLDER}/", MaxKeys=1
                    )
                    return
                self._prove()
        except (S3Refused, CredentialsRefused) as error:
            raise type(error)(error.message, code="store_refused") from error
        self._proven_until = self._clock() + _PROOF_SECONDS

    def _prove(self) -> None:
        # Nothing deletes the object. So the first process of all writes it, and then nobody can again.
        once = f"{self._base}{RESERVED_FOLDER}/{_PROOF}"
        if self._create(once, b"inferq", DEFAULT_TYPE) and self._create(once, b"inferq", DEFAULT_TYPE):
            raise StoreOutage(
                f"S3 cannot be used for bucket {self.bucket!r}: it replaced an object although the request said "
                "If-None-Match: *, so that results could overwrite each other; use a service that supports "
                "conditional writes",
                code="store_overwrites",
            )
        # Refusing that one needs no room on the disk, writing this one does.
        self._client.put_object(Bucket=self.bucket, Key=f"{self._base}{RESERVED_FOLDER}/ping", Body=b"inferq")

    def _name(self, key: str) -> str:
        return self._base + check_key(key)

    @contextmanager
    def _calling(self, key: str, *, may_be_absent: bool = False) -> Iterator[None]:
        with s3_errors(self.bucket, key, may_be_absent=may_be_absent):
            yield


def open_object(endpoint_url: str | None, bucket: str, key: str) -> tuple[ObjectInfo, Pieces]:
    """An object of any bucket and its pieces.

    Raises ObjectNotFound and StoreOutage; CredentialsRefused only if S3 refuses this machine any other request,
    too: a proxy that rewrites a key breaks the signature of that request alone.
    """
    client = _shared_client(endpoint_url)
    try:
        return _opened(client, bucket, key, CHUNK_BYTES)
    except CredentialsRefused:
        try:
            with s3_errors(bucket, ""):
                client.list_objects_v2(Bucket=bucket, MaxKeys=1)
        except CredentialsRefused:
            raise
        except StoreOutage:
            pass
    try:
        return _opened(client, bucket, key, CHUNK_BYTES)  # S3 may just have begun to accept the credentials
    except CredentialsRefused as error:
        raise StoreOutage(error.message) from error


_shared_client = cache(s3_client)


def list_bucket(endpoint_url: str | None, bucket: str, prefix: str) -> Iterator[ObjectInfo]:
    """The objects of any bucket whose keys begin with `prefix`. Raises StoreOutage."""
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
    with s3_errors(bucket, name, may_be_absent=True):
        found = (
            client.get_object(Bucket=bucket, Key=name, Range=f"bytes={start}-")
            if start
            else (client.get_object(Bucket=bucket, Key=name))
        )
    chunks = _pieces(found["Body"], bucket, name, chunk_bytes)
    next(chunks)  # from here on, closing the generator releases the connection
    return _info(name, found), chunks


def _info(key: str, found: HeadObjectOutputTypeDef | GetObjectOutputTypeDef) -> ObjectInfo:
    return ObjectInfo(
        key=key,
        bytes=found["ContentLength"],
        content_type=found.get("ContentType") or DEFAULT_TYPE,
        modified=found["LastModified"],
        etag=found["ETag"].strip('"'),
    )


def _pieces(body: Any, bucket: str, name: str, chunk_bytes: int) -> Pieces:
    with s3_errors(bucket, name), closing(body):
        yield b""
        yield from body.iter_chunks(chunk_bytes)


@contextmanager
def s3_errors(bucket: str, key: str, *, may_be_absent: bool = False) -> Iterator[None]:
    """Turns boto3's errors into StoreOutage.

    With `may_be_absent`, S3's own code NoSuchKey is ObjectNotFound. Any other 404 is not: a proxy or an ingress
    answers it while S3 is unavailable.
    """
    try:
        yield
    except ClientError as error:
        if may_be_absent and _code(error) == "NoSuchKey":
            raise ObjectNotFound(f"there is no object {key!r}") from error
        raise _explained(error, bucket, key) from error
    except _NO_CREDENTIALS as error:
        raise CredentialsRefused(_unusable(bucket, error)) from error
    except (BotoCoreError, Boto3Error) as error:
        raise StoreUnreachable(_unusable(bucket, error)) from error


def _explained(error: ClientError, bucket: str, key: str) -> StoreOutage:
    code, status = _code(error), _status(error)
    if code == "NoSuchBucket":
        return BucketNotFound(
            f"S3 has no bucket {bucket!r} ({code}): create it, or correct INFERQ_STORE_URL "
            "(of inputs: INFERQ_FETCH_S3_BUCKETS)"
        )
    if code in _CREDENTIAL_FAULTS:
        return CredentialsRefused(
            f"S3 refuses the credentials or the clock of this machine ({code}): correct the time, "
            "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN or AWS_REGION"
        )
    if code == "NotImplemented":
        return StoreOutage(f"S3 does not support what inferq asks of bucket {bucket!r} ({code}): {error}")
    named = code != "" and not code.isdigit()
    if named and status in {401, 403}:
        return S3Refused(
            f"S3 refuses bucket {bucket!r} ({code}): the credentials need s3:GetObject, s3:PutObject, "
            "s3:DeleteObject and s3:ListBucket (without the last, what is missing looks forbidden)"
        )
    if not named and status < 500:
        return StoreOutage(
            f"the answer {status} for {key!r} in bucket {bucket!r} has no S3 error code: a proxy or an ingress "
            "answered instead of S3; check INFERQ_S3_ENDPOINT_URL and what runs behind it"
        )
    return StoreOutage(f"S3 answered {code} ({status}) for {key!r} in bucket {bucket!r}: {error}")


def _code(error: ClientError) -> str:
    """S3's error code; "" or the HTTP status if the answer has none."""
    return str(error.response["Error"].get("Code") or "")


def _status(error: ClientError) -> int:
    return error.response["ResponseMetadata"].get("HTTPStatusCode") or 0


def _unusable(bucket: str, error: Exception) -> str:
    return (
        f"S3 cannot be used for bucket {bucket!r}: {error}; check INFERQ_S3_ENDPOINT_URL, the network "
        "and the credentials (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"
    )


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
