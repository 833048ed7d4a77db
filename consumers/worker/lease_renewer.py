"""Renews the task leases of runs whose own threads are in a blocking call, such as an upload."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextvars import copy_context
from functools import partial

from inferq.consumers.runtime.process import LOOK_SECONDS

_log = logging.getLogger(__name__)


class LeaseRenewer:
    """One thread for all runs of a worker; it ends while there are none.

    Each `renew` is called every LOOK_SECONDS, so a shorter run costs nothing more.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._renewals: dict[str, Callable[[], None]] = {}
        self._thread: threading.Thread | None = None

    def add(self, run: str, renew: Callable[[], None]) -> None:
        """Call `renew` from now on. It must be safe to call from another thread."""
        with self._lock:
            self._renewals[run] = partial(copy_context().run, renew)  # it logs as the run does
            if self._thread is None:
                self._thread = threading.Thread(target=self._renew_all, name="leases", daemon=True)
                self._thread.start()

    def remove(self, run: str) -> None:
        """Call it no more; a call in progress may still end."""
        with self._lock:
            self._renewals.pop(run, None)

    def _renew_all(self) -> None:
        while True:
            time.sleep(LOOK_SECONDS)
            with self._lock:
                if not self._renewals:
                    self._thread = None
                    return
                renewals = list(self._renewals.values())
            for renew in renewals:
                try:
                    renew()
                except Exception:
                    _log.exception("a lease was not renewed")
