"""Opens the object store that the settings name."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from inferq.schemas import InstallationError
from inferq.storage.objects.local import LocalStore
from inferq.storage.objects.store import ObjectStore
from inferq.storage.settings import StorageSettings


def open_store(settings: StorageSettings) -> ObjectStore:
    """The store that `INFERQ_STORE_URL` names. Raises InstallationError if it names none."""
    url = urlsplit(settings.store_url)
    if url.scheme == "file":
        if url.netloc not in {"", "localhost"} or not url.path.startswith("/"):
            raise InstallationError(
                "INFERQ_STORE_URL has no absolute path: write file:///folder",
                code="bad_store_url",
            )
        return LocalStore(Path(unquote(url.path)), fsync=settings.store_fsync, create=settings.store_create)
    if url.scheme == "s3" and url.netloc and not (url.query or url.fragment or "@" in url.netloc):
        from inferq.storage.objects.s3 import S3Store  # boto3 is slow to import

        return S3Store(url.netloc, unquote(url.path), endpoint_url=settings.s3_endpoint_url)
    # The URL is not quoted: it may hold a key.
    raise InstallationError(
        "INFERQ_STORE_URL is not s3://bucket/prefix or file:///folder", code="bad_store_url"
    )
