"""The paths of the gateway as its users reach it."""

from __future__ import annotations

from urllib.parse import unquote, urlsplit

from inferq.schemas.paths import artifact_url, batch_path, task_path


class Paths:
    """Builds the paths that answers hold. All start with the path of the gateway's address, if it has one.

    A proxy may serve the gateway below a path: with the address `https://example.com/inferq`, a task has the path
    `/inferq/v1/tasks/{id}`.
    """

    def __init__(self, api_url: str) -> None:
        self._address = api_url.rstrip("/")
        self._prefix = urlsplit(self._address).path
        self.root_path = unquote(self._prefix)
        """The prefix as ASGI has it: decoded."""

    @property
    def tasks(self) -> str:
        return f"{self._prefix}/v1/tasks"

    @property
    def batches(self) -> str:
        return f"{self._prefix}/v1/batches"

    def task(self, task_id: str) -> str:
        return f"{self._prefix}{task_path(task_id)}"

    def batch(self, batch_id: str) -> str:
        return f"{self._prefix}{batch_path(batch_id)}"

    def artifact_url(self, task_id: str, name: str) -> str:
        """The URL of an artifact."""
        return artifact_url(self._address, task_id, name)
