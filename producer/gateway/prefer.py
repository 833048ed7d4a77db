"""The `Prefer` header (RFC 7240), of which the gateway knows `wait`."""

from __future__ import annotations

import re

MAX_WAIT = 60

_WAIT = re.compile(r"\s*wait\s*=\s*\"?(\d{1,9})\"?\s*(?:;.*)?", re.IGNORECASE)


def wait_seconds(headers: list[str]) -> int | None:
    """How long the client would wait for the task's end, in seconds, at most 60; None if it would not.

    Of several the first counts; a malformed one counts as absent (RFC 7240, section 2).
    """
    for preference in ",".join(headers).split(","):
        if found := _WAIT.fullmatch(preference):
            return min(int(found[1]), MAX_WAIT)
    return None


def applied(seconds: int | None) -> dict[str, str]:
    """The header that tells the client what was done about its preference."""
    return {} if seconds is None else {"Preference-Applied": f"wait={seconds}", "Vary": "Prefer"}
