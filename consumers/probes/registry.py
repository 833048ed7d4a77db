"""The metrics registry that the jobs share with their process."""

from __future__ import annotations

from prometheus_client import CollectorRegistry

REGISTRY = CollectorRegistry()
"""The metrics of the jobs, as `inferq callbacks` serves them."""
