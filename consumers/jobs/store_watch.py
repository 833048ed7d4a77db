"""Checks the object store for a process whose jobs use it, so that its readiness says whether they can."""

from __future__ import annotations

import logging
import threading

from inferq.schemas import Outage
from inferq.storage import ObjectStore

_log = logging.getLogger(__name__)

_LOOK_SECONDS = 60.0
_AGAIN_SECONDS = 5.0
"""From one check to the next, while the store can be used and while it cannot."""


class StoreWatch:
    """Checks on a thread of its own: a probe must not wait for a store that hangs."""

    def __init__(
        self, store: ObjectStore, *, every: float = _LOOK_SECONDS, again: float = _AGAIN_SECONDS
    ) -> None:
        self._store = store
        self._every = every
        self._again = again
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="store watch", daemon=True)
        self.waiting_for: str | None = "object store: not checked yet"

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                self._store.ping()
            except Outage as error:
                fault = f"object store: {error}"
                if fault != self.waiting_for:
                    _log.warning("not ready: %s", fault)
                self.waiting_for = fault
            except Exception:
                _log.exception("the object store cannot be checked")
            else:
                self.waiting_for = None
            self._closed.wait(self._again if self.waiting_for else self._every)
