"""Parses `s3:` URLs strictly, because the installation's credentials read the objects they name."""

from __future__ import annotations

import re

from inferq.schemas.errors import InvalidTask

S3_BUCKET = r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]"
"""The pattern of bucket names; case does not count."""


_CONTROL = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
"""Control characters and lone surrogates: no key has them, and logs and headers cannot hold them."""
_S3 = re.compile(rf"s3://({S3_BUCKET})/(.+)", re.IGNORECASE | re.DOTALL)
_S3_PREFIX = re.compile(rf"s3://({S3_BUCKET})(?:/(.*))?", re.IGNORECASE | re.DOTALL)


def split_s3_url(url: str) -> tuple[str, str]:
    """Bucket and key of `s3://bucket/key`. The key is not decoded. Raises InvalidTask."""
    match = _S3.fullmatch(url)
    if not match:
        raise _bad("an s3: URL looks like s3://bucket/key")
    bucket, key = match[1], match[2]
    # Some clients and servers resolve such segments, and would read another object.
    if (
        any(segment in {".", ".."} for segment in key.split("/"))
        or not key.strip("/")
        or _CONTROL.search(key)
    ):
        raise _bad("the key of an s3: URL is empty, or has a '.' or '..' segment or a control character")
    return bucket, key


def split_s3_prefix(url: str) -> tuple[str, str]:
    """Bucket and prefix of `s3://bucket/prefix` or `s3://bucket`. Raises InvalidTask."""
    match = _S3_PREFIX.fullmatch(url)
    if match is None:
        raise InvalidTask("an s3: source looks like s3://bucket/prefix", code="bad_input_url")
    return split_s3_url(url) if match[2] else (match[1], "")


def _bad(message: str) -> InvalidTask:
    return InvalidTask(message, code="bad_input_url")
