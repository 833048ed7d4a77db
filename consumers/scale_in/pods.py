"""The workers' pods: listed once, then watched (https://kubernetes.io/docs/reference/using-api/api-concepts/).

The client's own informer tries again without a pause and waits for ever on a dead connection.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from http import HTTPStatus
from typing import Any, NamedTuple

from kubernetes.client import ApiException, CoreV1Api
from kubernetes.watch import Watch

from inferq.broker import backoff
from inferq.consumers.scale_in.api import API_ERRORS, REQUEST_SECONDS, reason_of
from inferq.consumers.scale_in.costs import COST_ANNOTATION, PodFacts
from inferq.consumers.scale_in.metrics import GuardMetrics

SELECTOR = "app.kubernetes.io/name=inferq,app.kubernetes.io/component=worker"
TYPE_LABEL = "inferq.dev/type"

WATCH_SECONDS = 60
"""How long one watch lasts. A connection that died unnoticed is replaced after it."""
_LATE_SECONDS = 10.0
"""How much later the end of a watch may come."""
_SHORT_SECONDS = 1.0
"""A watch that ends sooner than that counts as a failure: the next one waits."""

_log = logging.getLogger(__name__)


class _Known(NamedTuple):
    version: str
    uid: str
    facts: PodFacts | None


class WorkerPods:
    """Keeps the pods of all workers of a namespace, on a thread of its own."""

    def __init__(self, api: CoreV1Api, namespace: str, metrics: GuardMetrics) -> None:
        self._api = api
        self._namespace = namespace
        self._metrics = metrics
        self._lock = threading.Lock()
        self._pods: dict[str, _Known] | None = None
        self._version: str | None = None
        self.failing = False
        self._watch: Any = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pods", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        if (watch := self._watch) is not None:
            watch.stop()
        self._thread.join(5)

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def facts(self) -> tuple[PodFacts, ...] | None:
        """The pods that live and are not being deleted, as far as known; None before the first list."""
        with self._lock:
            if self._pods is None:
                return None
            return tuple(known.facts for known in self._pods.values() if known.facts is not None)

    def note(self, pod: Mapping[str, Any]) -> None:
        """Take in a pod as the API server gave it. An event that is older than what is known changes nothing."""
        metadata = pod["metadata"]
        name, uid, version = metadata["name"], metadata["uid"], metadata["resourceVersion"]
        with self._lock:
            if self._pods is None:
                return
            known = self._pods.get(name)
            if known is None or known.uid != uid or not _is_older(version, known.version):
                self._pods[name] = _Known(version, uid, facts_of(pod))

    def forget(self, name: str, uid: str) -> None:
        """Take in that a pod is gone."""
        with self._lock:
            if self._pods is not None and name in self._pods and self._pods[name].uid == uid:
                del self._pods[name]

    def _run(self) -> None:
        failures = 0
        while not self._stopped.is_set():
            began = time.monotonic()
            try:
                if self._version is None:
                    self._list()
                self._follow()
                failures = failures + 1 if time.monotonic() - began < _SHORT_SECONDS else 0
                self._metrics.restarts["ended"].inc()
            except Exception as error:
                if self._stopped.is_set():
                    return
                failures += 1
                self._lost(error)
            if failures:
                self._stopped.wait(backoff(failures))

    def _lost(self, error: Exception) -> None:
        """After any error the pods are listed again: the answer shows that the API server works."""
        self._version = None
        if isinstance(error, ApiException) and error.status == HTTPStatus.GONE:
            self._metrics.restarts["expired"].inc()
            return
        self._metrics.restarts["failed"].inc()
        if not self.failing:  # once, not at each try
            unforeseen = not isinstance(error, API_ERRORS)
            _log.warning(
                "pods cannot be watched: %s; still retrying",
                reason_of(error),
                exc_info=error if unforeseen else None,
            )
        self.failing = True

    def _list(self) -> None:
        answer = self._api.list_namespaced_pod(
            self._namespace,
            label_selector=SELECTOR,
            _preload_content=False,
            _request_timeout=REQUEST_SECONDS,
        )
        pods = _read(answer)
        known = {
            pod["metadata"]["name"]: _Known(
                pod["metadata"]["resourceVersion"], pod["metadata"]["uid"], facts_of(pod)
            )
            for pod in pods["items"]
        }
        with self._lock:
            self._pods = known
        self._version = pods["metadata"]["resourceVersion"]
        if self.failing:
            _log.info("pods are watched again")
        self.failing = False

    def _follow(self) -> None:
        """Watch until the watch ends."""
        watch: Any = Watch(return_type="object")  # plain JSON: a field that the client refuses ends no watch
        self._watch = watch
        try:
            for event in watch.stream(
                self._api.list_namespaced_pod,
                self._namespace,
                label_selector=SELECTOR,
                resource_version=self._version,
                allow_watch_bookmarks=True,
                timeout_seconds=WATCH_SECONDS,
                _request_timeout=(REQUEST_SECONDS[0], WATCH_SECONDS + _LATE_SECONDS),
            ):
                if event is not None:  # a line that is not JSON
                    self._take_in(event["type"], event["object"])
                    self._version = watch.resource_version
        finally:
            self._watch = None

    def _take_in(self, kind: str, pod: Mapping[str, Any]) -> None:
        if kind in ("ADDED", "MODIFIED"):
            self.note(pod)
        elif kind == "DELETED":
            self.forget(pod["metadata"]["name"], pod["metadata"]["uid"])


def facts_of(pod: Mapping[str, Any]) -> PodFacts | None:
    """The facts of a pod; None for one that no ReplicaSet can remove any more."""
    metadata, status = pod["metadata"], pod.get("status") or {}
    owner = next((owner for owner in metadata.get("ownerReferences") or () if owner.get("controller")), None)
    ended = status.get("phase") in ("Succeeded", "Failed")
    if owner is None or owner["kind"] != "ReplicaSet" or metadata.get("deletionTimestamp") or ended:
        return None
    conditions = status.get("conditions") or ()
    return PodFacts(
        name=metadata["name"],
        uid=metadata["uid"],
        owner=owner["uid"],
        task_type=(metadata.get("labels") or {}).get(TYPE_LABEL, ""),
        ready=any(each["type"] == "Ready" and each["status"] == "True" for each in conditions),
        cost=_cost((metadata.get("annotations") or {}).get(COST_ANNOTATION)),
    )


def _cost(text: str | None) -> int | None:
    with suppress(TypeError, ValueError):
        return int(text or "")
    return None


def _is_older(version: str, known: str) -> bool:
    """Whether a resourceVersion is older. Those of the built-in types can be compared as numbers."""
    try:
        return int(version) < int(known)
    except ValueError:
        return False


def _read(answer: Any) -> Any:
    """The JSON of an answer that the client did not read. Raises ApiException or ValueError."""
    if answer.status != HTTPStatus.OK:
        raise ApiException(http_resp=answer)
    return json.loads(answer.data)
