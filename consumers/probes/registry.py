"""What the jobs of one process share with the process itself."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

REGISTRY = CollectorRegistry()
"""The metrics of the jobs, as `inferq callbacks` serves them."""
