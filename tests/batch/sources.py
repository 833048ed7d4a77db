"""Sources of batches, and what their outputs say."""

from __future__ import annotations


def lines(count: int) -> bytes:
    return b"".join(b'{"payload": %d}\n' % number for number in range(1, count + 1))


def payloads(output: list[dict[str, object]]) -> list[object]:
    return [entry["output"]["payload"] for entry in output]  # type: ignore[index]
