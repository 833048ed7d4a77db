"""The `Prefer` header (RFC 7240); the gateway supports `wait`."""

from __future__ import annotations

import re
from typing import Any

MAX_WAIT = 60

WAITS: dict[str, Any] = {
    "parameters": [
        {
            "name": "Prefer",
            "in": "header",
            "description": f"`wait=20` waits up to 20 seconds for the task's end, at most {MAX_WAIT}.",
            "schema": {"type": "string", "examples": ["wait=20"]},
        }
    ]
}
"""The `openapi_extra` of a route that waits."""

_WAIT = re.compile(r"\s*wait\s*=\s*\"?(\d{1,9})\"?\s*(?:;.*)?", re.IGNORECASE)


def wait_seconds(headers: list[str]) -> int | None:
    """Seconds that the client waits for the task's end, at most 60; None if it does not wait.

    The first of several counts; a malformed one is ignored (RFC 7240, section 2).
    """
    for preference in ",".join(headers).split(","):
        if found := _WAIT.fullmatch(preference):
            return min(int(found[1]), MAX_WAIT)
    return None


def preference_applied(seconds: int | None) -> dict[str, str]:
    """The headers that tell the client which preference was applied."""
    return {} if seconds is None else {"Preference-Applied": f"wait={seconds}", "Vary": "Prefer"}
