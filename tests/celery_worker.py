"""Celery's worker on a thread of the test's own."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from celery import Celery
from celery.contrib.testing.worker import start_worker


@contextmanager
def working(app: Celery, **more: Any) -> Iterator[None]:
    """The application's jobs are worked on; `more` goes to Celery's own `start_worker`."""
    level = logging.root.level  # Celery sets it, and tests that follow in this process would miss warnings
    with start_worker(
        app, pool="threads", concurrency=4, perform_ping_check=False, loglevel="ERROR", **more
    ) as worker:
        # Else its loop may notice only after 10 s that it is to end, as no signal wakes it here.
        worker.timer.call_repeatedly(0.1, _nothing)
        try:
            yield
        finally:
            logging.root.setLevel(level)


def _nothing() -> None:
    return
