"""The lease that lets one guard work at a time (https://kubernetes.io/docs/concepts/architecture/leases/).

Two at a time do no harm, since both find the same costs; they would only ask twice. The client's own leader election
cannot be stopped, sets no time-outs, and ends for good when it loses the lease.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any

from kubernetes.client import ApiException, CoordinationV1Api, V1Lease, V1LeaseSpec, V1ObjectMeta

from inferq.consumers.scale_in.api import API_ERRORS, REQUEST_SECONDS, reason_of

NAME = "scale-in-guard"
LEASE_SECONDS = 15
"""How long a guard that renews its lease no more keeps others out."""
_RENEW_SECONDS = 3.0
_HOLDS_SECONDS = 10.0
"""How long a guard counts on its lease after it renewed it: less than others wait."""

_log = logging.getLogger(__name__)


class Lease:
    """The lease as the guard `identity` sees it. Only this machine's clock counts: clocks of nodes differ."""

    def __init__(
        self,
        api: CoordinationV1Api,
        namespace: str,
        identity: str,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._api = api
        self._namespace = namespace
        self._identity = identity
        self._clock = clock
        self._next_try = float("-inf")
        self._renewed: float | None = None
        self._seen: tuple[object, float] = (None, 0.0)
        self._failing = False

    @property
    def held(self) -> bool:
        """Whether this guard may work."""
        return self._renewed is not None and self._clock() - self._renewed < _HOLDS_SECONDS

    def keep(self) -> bool:
        """Take or renew the lease if that is due. Gives whether it is held; raises nothing."""
        if (now := self._clock()) >= self._next_try:
            self._next_try = now + _RENEW_SECONDS
            was_held = self.held
            try:
                if self._take():
                    self._renewed = now
                else:
                    self._renewed = None
                self._failing = False
            except API_ERRORS as error:
                if isinstance(error, ApiException) and error.status == HTTPStatus.CONFLICT:
                    pass  # another guard was faster; the next try shows which
                elif not self._failing:
                    _log.warning("the lease cannot be renewed: %s; still retrying", reason_of(error))
                    self._failing = True
            if self.held != was_held:
                _log.info("the lease is held" if self.held else "the lease is not held: another guard works")
        return self.held

    def release(self) -> None:
        """Let the next guard take the lease at once."""
        if not self.held:
            return
        self._renewed = None
        with suppress(*API_ERRORS):
            lease: Any = self._read()
            if lease.spec.holder_identity == self._identity:
                lease.spec.holder_identity = ""
                lease.spec.lease_duration_seconds = 1
                self._replace(lease)

    def _take(self) -> bool:
        try:
            lease: Any = self._read()
        except ApiException as error:
            if error.status != HTTPStatus.NOT_FOUND:
                raise
            self._create()
            return True
        spec = lease.spec = lease.spec or V1LeaseSpec()
        mine = spec.holder_identity == self._identity
        if not mine and spec.holder_identity and not self._expired(spec):
            return False
        now = datetime.now(UTC)
        if not mine:
            spec.acquire_time = now
            spec.lease_transitions = (spec.lease_transitions or 0) + 1
        spec.holder_identity = self._identity
        spec.lease_duration_seconds = LEASE_SECONDS
        spec.renew_time = now
        self._replace(lease)
        return True

    def _expired(self, spec: V1LeaseSpec) -> bool:
        """Whether the holder has not renewed the lease while this guard watched, for as long as it lasts."""
        now, state = self._clock(), (spec.holder_identity, spec.renew_time)
        if self._seen[0] != state:
            self._seen = state, now
        return now - self._seen[1] > (spec.lease_duration_seconds or LEASE_SECONDS)

    def _read(self) -> V1Lease:
        return self._api.read_namespaced_lease(NAME, self._namespace, _request_timeout=REQUEST_SECONDS)

    def _create(self) -> None:
        now = datetime.now(UTC)
        spec = V1LeaseSpec(
            holder_identity=self._identity,
            lease_duration_seconds=LEASE_SECONDS,
            acquire_time=now,
            renew_time=now,
        )
        lease = V1Lease(metadata=V1ObjectMeta(name=NAME), spec=spec)
        self._api.create_namespaced_lease(self._namespace, lease, _request_timeout=REQUEST_SECONDS)

    def _replace(self, lease: V1Lease) -> None:
        """Raises ApiException (409) if the lease has changed since it was read."""
        self._api.replace_namespaced_lease(NAME, self._namespace, lease, _request_timeout=REQUEST_SECONDS)
