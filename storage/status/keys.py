"""The keys of tasks and batches in Redis. A tenant has no colon, so keys are unique."""

from __future__ import annotations


def record_key(tenant: str, task_id: str) -> str:
    """The key of a task's hash."""
    return f"inferq:t:{tenant}:{task_id}"


def flight_key(tenant: str, work: str) -> str:
    """The key that names the run that computes `work`."""
    return f"inferq:flight:{tenant}:{work}"


def batch_key(tenant: str, batch_id: str) -> str:
    """The key of a batch's hash."""
    return f"inferq:batch:{tenant}:{batch_id}"
