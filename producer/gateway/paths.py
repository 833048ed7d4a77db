"""The paths of the gateway as its users reach it."""

from __future__ import annotations

from urllib.parse import unquote, urlsplit


class Paths:
    """Builds the paths that answers hold. All start with the path of the gateway's address, if it has one.

    A proxy may serve the gateway below a path: with the address `https://example.com/inferq`, a task has the path
    `/inferq/v1/tasks/{id}`.
    """

    def __init__(self, api_url: str) -> None:
        address = api_url.rstrip("/")
        self._prefix = urlsplit(address).path
        self.origin = address.removesuffix(self._prefix)
        self.root_path = unquote(self._prefix)
        """The prefix as ASGI has it: decoded."""

    @property
    def tasks(self) -> str:
        return f"{self._prefix}/v1/tasks"

    @property
    def batches(self) -> str:
        return f"{self._prefix}/v1/batches"

    def task(self, task_id: str) -> str:
        return f"{self.tasks}/{_segment(task_id)}"

    def batch(self, batch_id: str) -> str:
        return f"{self.batches}/{_segment(batch_id)}"

    def task_url(self, task_id: str) -> str:
        """The URL of a task."""
        return f"{self.origin}{self.task(task_id)}"


def _segment(name: str) -> str:
    # `.` and `..` are valid ids; unescaped, HTTP clients would resolve them as folders.
    return "%2E" * len(name) if name in (".", "..") else name
