"""The paths of tasks, batches and artifacts on the gateway, for those who serve, ask for and name them."""

from __future__ import annotations

from urllib.parse import quote


def task_path(task_id: str) -> str:
    return f"/v1/tasks/{_segment(task_id)}"


def batch_path(batch_id: str) -> str:
    return f"/v1/batches/{_segment(batch_id)}"


def artifact_path(task_id: str, name: str) -> str:
    return f"{task_path(task_id)}/artifacts/{quote(name, safe='')}"


def artifact_url(api_url: str, task_id: str, name: str) -> str:
    """The URL of an artifact on the gateway with the address `api_url`."""
    return api_url.rstrip("/") + artifact_path(task_id, name)


def _segment(identifier: str) -> str:
    # `.` and `..` are valid ids, but in a URL they would be folders.
    return "%2E" * len(identifier) if identifier in (".", "..") else quote(identifier, safe=":")
