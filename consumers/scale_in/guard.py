"""The guard: reads, decides and patches, round by round."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, NamedTuple

from kubernetes.client import ApiClient, ApiException, CoordinationV1Api, CoreV1Api
from prometheus_client import make_wsgi_app

from inferq.broker import backoff
from inferq.consumers.rounds import Rounds
from inferq.consumers.scale_in.api import API_ERRORS, REQUEST_SECONDS, reason_of, retry_after
from inferq.consumers.scale_in.costs import COST_ANNOTATION, Patch, patches
from inferq.consumers.scale_in.hearing import Hearing
from inferq.consumers.scale_in.lease import Lease
from inferq.consumers.scale_in.metrics import GuardMetrics, PatchOutcome
from inferq.consumers.scale_in.pods import WorkerPods
from inferq.consumers.scale_in.settings import ScaleInSettings
from inferq.schemas.probe_server import Health, ProbeServer, Readiness
from inferq.storage import StatusIndex, StatusOutage, StorageSettings
from inferq.storage.workers import WorkerRegistry

_MOST_PATCHES = 20
"""The most patches of one round: with the default interval at most 80 a second."""
_STUCK_SECONDS = 120.0
_LONGEST_PAUSE_SECONDS = 30.0

_OUTCOMES: dict[int, PatchOutcome] = {
    HTTPStatus.NOT_FOUND: "gone",
    HTTPStatus.CONFLICT: "conflict",
    HTTPStatus.UNAUTHORIZED: "refused",
    HTTPStatus.FORBIDDEN: "refused",
    HTTPStatus.UNPROCESSABLE_ENTITY: "refused",
}

_log = logging.getLogger(__name__)


class _Refusal(NamedTuple):
    """How often in a row a pod could not be patched, and when to try again."""

    times: int
    retry_at: float


_NEVER = _Refusal(0, float("-inf"))


class ScaleInGuard:
    """Keeps the deletion costs of the workers' pods of one namespace, until `stop`.

    All that it knows is in Redis and in the API server, so it may be killed and started again at any time.
    """

    def __init__(
        self,
        settings: ScaleInSettings,
        storage: StorageSettings,
        client: ApiClient,
        *,
        namespace: str,
        identity: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._namespace = namespace
        self._clock = clock
        self._rounds = Rounds(clock=clock)
        self.metrics = GuardMetrics()
        self._index = StatusIndex.from_settings(storage)
        self._hearing = Hearing(WorkerRegistry(self._index), clock=clock)
        self._api = CoreV1Api(client)
        self._pods = WorkerPods(self._api, namespace, self.metrics)
        self._lease = Lease(CoordinationV1Api(client), namespace, identity, clock=clock)
        self._redis_fault: str | None = "the first reading of Redis"
        self._refusals: dict[str, _Refusal] = {}
        self._failures = 0
        self._resumes = float("-inf")
        self._last_round = clock()
        self.probes: ProbeServer | None = None
        if settings.probe_port is not None:
            self.probes = ProbeServer(
                settings.probe_host,
                settings.probe_port,
                readiness=self.readiness,
                health=self.health,
                metrics=make_wsgi_app(self.metrics.registry),
            )

    def run(self) -> None:
        """Work until stopped. Raises InstallationError for a Redis that cannot be used."""
        self._index.require_supported()
        self._pods.start()
        if self.probes is not None:
            self.probes.start()
        try:
            self._rounds.run(self._try_round, self._settings.scale_in_interval)
        finally:
            self._lease.release()
            self._pods.stop()
            if self.probes is not None:
                self.probes.close()

    def stop(self) -> None:
        """End `run` after the present round. A signal handler may call it."""
        self._rounds.stop()

    def _try_round(self) -> None:
        try:
            self.round()
        except Exception:
            _log.exception("a round ended by an unexpected error; still retrying")
            self._pause_patches(None)
        self._last_round = self._clock()

    def round(self) -> None:
        """Read what is known, and make the patches that are due."""
        self._listen()
        leads = self._lease.keep()
        self.metrics.leader.set(leads)
        pods = self._pods.facts
        if pods is None:
            return
        statements = self._hearing.statements()
        self.metrics.count(pods, statements)
        if not leads or self._clock() < self._resumes:
            return
        wanted = patches(pods, statements)
        self._refusals = {patch.pod.uid: self._refusal(patch) for patch in wanted}
        due = [patch for patch in wanted if self._clock() >= self._refusal(patch).retry_at]
        due.sort(key=lambda patch: self._refusal(patch).times)
        done = all(self._patch(patch) for patch in due[:_MOST_PATCHES]) and len(wanted) <= _MOST_PATCHES
        if done and len(due) == len(wanted) and self._redis_fault is None and not self._pods.failing:
            self.metrics.last_success.set_to_current_time()

    def _listen(self) -> None:
        try:
            self._hearing.listen()
        except StatusOutage as error:
            # Its own log says so once. Costs stay as they are, since nothing is known.
            self._redis_fault = str(error)
        else:
            self._redis_fault = None

    def _refusal(self, patch: Patch) -> _Refusal:
        return self._refusals.get(patch.pod.uid, _NEVER)

    def _patch(self, patch: Patch) -> bool:
        """Make a patch. False: make no more in this round."""
        pod = patch.pod
        body = {"metadata": {"uid": pod.uid, "annotations": {COST_ANNOTATION: str(patch.cost)}}}
        try:
            answer: Any = self._api.patch_namespaced_pod(
                pod.name, self._namespace, body, _preload_content=False, _request_timeout=REQUEST_SECONDS
            )
            if answer.status != HTTPStatus.OK:
                raise ApiException(http_resp=answer)
            self._pods.note(answer.json())
        except API_ERRORS as error:
            return self._failed(patch, error)
        _log.debug("pod %s: deletion cost %s -> %s", pod.name, pod.cost, patch.cost)
        self.metrics.patches["done"].inc()
        self._failures = 0
        return True

    def _failed(self, patch: Patch, error: Exception) -> bool:
        status = error.status if isinstance(error, ApiException) else None
        outcome = _OUTCOMES.get(status or 0, "failed")
        self.metrics.patches[outcome].inc()
        if outcome == "gone":
            self._pods.forget(patch.pod.name, patch.pod.uid)
            return True
        # One pod that cannot be patched must not keep the others waiting.
        times = self._refusal(patch).times + 1
        self._refusals[patch.pod.uid] = _Refusal(times, self._clock() + backoff(times, base=1.0))
        # After a conflict another pod has its name, as the watch is about to tell.
        if times == 1 and outcome != "conflict":
            advice = "; see the guard's Role and ValidatingAdmissionPolicy" if outcome == "refused" else ""
            _log.warning(
                "pod %s cannot be patched: %s; still retrying%s", patch.pod.name, reason_of(error), advice
            )
        if outcome == "failed":
            self._pause_patches(retry_after(error))
        return outcome != "failed"

    def _pause_patches(self, asked: float | None) -> None:
        self._failures += 1
        wait = backoff(self._failures, base=1.0, cap=_LONGEST_PAUSE_SECONDS)
        self._resumes = self._clock() + max(wait, min(asked or 0.0, _LONGEST_PAUSE_SECONDS))

    def readiness(self) -> Readiness:
        """Ready once the pods are listed and while Redis answers. A guard without the lease is ready to take it."""
        waiting = [] if self._pods.facts is not None and not self._pods.failing else ["the Kubernetes API"]
        if self._redis_fault is not None:
            waiting.append("Redis")
        return Readiness(not waiting, tuple(waiting))

    def health(self) -> Health:
        """Whether rounds are made and pods are watched. An unavailable Redis or API server is no fault of it."""
        faults = []
        if (late := self._clock() - self._last_round) > _STUCK_SECONDS:
            faults.append(f"no round has ended for {late:.0f} s")
        if not self._pods.is_alive():
            faults.append("pods are not watched")
        return Health(tuple(faults))
