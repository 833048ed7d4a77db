"""The paths of tasks and batches on the gateway."""

from __future__ import annotations


def task_path(task_id: str) -> str:
    """The path of a task."""
    return f"/v1/tasks/{_segment(task_id)}"


def batch_path(batch_id: str) -> str:
    """The path of a batch."""
    return f"/v1/batches/{_segment(batch_id)}"


def _segment(name: str) -> str:
    # `.` and `..` are valid ids; unescaped, HTTP clients would resolve them as folders.
    return "%2E" * len(name) if name in (".", "..") else name
