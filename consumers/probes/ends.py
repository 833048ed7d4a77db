"""The metric of tasks that ended."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter

from inferq.consumers.probes.children import Children
from inferq.schemas import Result
from inferq.schemas.metrics import BoundedLabel

_NAMED = 100
"""How many task types and error codes are counted by name: messages and plug-ins may invent both."""


class TaskEnds:
    """Counts ends of tasks, each once: by the part that put it on record."""

    def __init__(self, registry: CollectorRegistry) -> None:
        ended = Counter(
            "inferq_tasks_ended",
            "Tasks that ended, by status (succeeded, failed, cancelled) and error code, empty for a success.",
            ["task_type", "status", "error_code"],
            registry=registry,
        )
        self._ended = Children(ended, task_type=BoundedLabel(_NAMED), error_code=BoundedLabel(_NAMED))

    def count(self, result: Result) -> None:
        """Count the task that ended with this result."""
        self._ended(result.task_type, result.status, result.error.code if result.error else "").inc()
