"""Whether a file holds what its content type says."""

from __future__ import annotations

import json
from functools import cache

import puremagic
from puremagic.main import magic_header_array

_SAME_TYPE = {
    "application/ogg": "audio/ogg", "audio/mp3": "audio/mpeg", "audio/vnd.wave": "audio/wav",
    "audio/wave": "audio/wav", "image/jpg": "image/jpeg",
}  # fmt: skip


def is_of_type(content: bytes, declared: str) -> bool:
    """Whether the content may be of that type: by its signature, or as far as it can be read."""
    kind = _plain(declared)
    try:
        if kind.startswith("text/"):
            content.decode()
            return True
        if kind == "application/json" or kind.endswith("+json"):
            json.loads(content)
            return True
    except ValueError:
        return False
    try:
        seen = {_plain(match.mime_type) for match in puremagic.magic_string(content)}
    except puremagic.PureError:
        seen = set()
    return kind in seen or kind not in _types_with_signature()


@cache
def _types_with_signature() -> frozenset[str]:
    return frozenset(_plain(entry.mime_type) for entry in magic_header_array) - {"application/octet-stream"}


def _plain(content_type: str) -> str:
    kind = content_type.partition(";")[0].strip().lower().replace("/x-", "/")
    return _SAME_TYPE.get(kind, kind)
