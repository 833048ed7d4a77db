"""Checks the object store once a minute for a readiness probe."""

from __future__ import annotations

import logging
import threading
import time

from inferq.schemas import Outage
from inferq.storage.objects.store import ObjectStore

_log = logging.getLogger(__name__)

_LOOK_SECONDS = 60.0
_AGAIN_SECONDS = 5.0
"""From one check to the next, while the store can be used and while it cannot."""
_HANGING_SECONDS = 15.0
"""How long a check may take before the store counts as unusable."""


class StoreWatch:
    """Checks on a thread of its own: a probe must not wait for a store that hangs."""

    def __init__(
        self,
        store: ObjectStore,
        *,
        every: float = _LOOK_SECONDS,
        again: float = _AGAIN_SECONDS,
        hanging: float = _HANGING_SECONDS,
    ) -> None:
        self._store = store
        self._every = every
        self._again = again
        self._hanging = hanging
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="store watch", daemon=True)
        self._fault: str | None = "object store: not checked yet"
        self._asked_at: float | None = None

    @property
    def waiting_for(self) -> str | None:
        """Why the store cannot be used; None if it can."""
        asked_at = self._asked_at
        if asked_at is not None and time.monotonic() - asked_at > self._hanging:
            return f"object store: no answer within {self._hanging:g} s"
        return self._fault

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.is_set():
            self._asked_at = time.monotonic()
            try:
                self._store.ping()
            except Outage as error:
                fault = f"object store: {error}"
                if fault != self._fault:
                    _log.warning("not ready: %s", fault)
                self._fault = fault
            except Exception:
                _log.exception("the object store cannot be checked")
            else:
                self._fault = None
            self._asked_at = None
            self._closed.wait(self._again if self._fault else self._every)
