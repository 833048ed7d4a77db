"""What the metrics of all parts share: the buckets of their histograms, and labels with few values."""

from __future__ import annotations

import re
import threading

SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0),
    *(2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0),
)
"""The buckets of every histogram of seconds: 1 ms to 1 h."""

OTHER = "other"

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


class BoundedLabel:
    """The values of a label that senders or plug-ins choose, such as tenants: the first `limit` names as they are.

    An empty value stays empty. Every later name, and every text that is no name, is `other`: each value of a label is a
    time series for ever, in the process and in Prometheus. Safe from many threads.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._known = {""}

    def __call__(self, value: str) -> str:
        if value in self._known:
            return value
        with self._lock:
            if len(self._known) <= self._limit and _NAME.fullmatch(value):
                self._known.add(value)
        return value if value in self._known else OTHER
