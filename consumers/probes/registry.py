"""The metrics registry that the jobs share with their process."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

from inferq.consumers.probes.ends import TaskEnds
from inferq.schemas.trace_metrics import SpansDropped

REGISTRY = CollectorRegistry()
"""The metrics of the jobs, as `inferq callbacks` serves them."""

ENDS = TaskEnds(REGISTRY)
"""The tasks that the jobs end, because no worker does."""

REGISTRY.register(SpansDropped())
