"""A stand-in of the Kubernetes API server, over HTTP: pods and leases of one namespace.

It lists with a resourceVersion and selectors of labels, watches with bookmarks and 410 for what is compacted, merges
patches, refuses conflicts, and fails if a test asks for it (https://kubernetes.io/docs/reference/using-api/api-concepts/).
"""

from __future__ import annotations

import copy
import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

NAMESPACE = "inferq"
Object = dict[str, Any]

_REASONS = {
    403: "Forbidden", 404: "NotFound", 409: "Conflict", 410: "Expired", 422: "Invalid",
    429: "TooManyRequests", 500: "InternalError", 503: "ServiceUnavailable",
}  # fmt: skip


class Refused(Exception):
    """The request is answered with this status."""

    def __init__(self, status: int, message: str = "as the test says", **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers

    def body(self) -> Object:
        return {
            "kind": "Status", "apiVersion": "v1", "status": "Failure", "message": str(self),
            "reason": _REASONS.get(self.status, ""), "code": self.status,
        }  # fmt: skip


@dataclass
class Fault:
    """The next `count` requests whose method and path match are answered with this error, or hang."""

    method: str
    part: str
    error: Refused | None = None
    hang: float = 0.0
    count: int = 1


@dataclass(frozen=True)
class Request:
    """A request and its answer."""

    method: str
    path: str
    status: int
    body: Any


@dataclass
class ApiServer:
    """Use as a context manager. All methods may be called from any thread."""

    admit: Callable[[Object, Object], str | None] = lambda _old, _new: None
    """Called with a pod before and after a patch; gives why it is refused."""
    bookmark_seconds: float = 0.5
    requests: list[Request] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._changed = threading.Condition()
        self._version = 1000
        self._floor = 0
        self._objects: dict[str, dict[str, Object]] = {"pods": {}, "leases": {}}
        self._events: list[tuple[int, str, Object]] = []
        self._watches = 0
        self._epoch = 0
        self._closed = False
        api = self

        class Handler(_Handler):
            server_api = api

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def write_kubeconfig(self, path: Path) -> Path:
        """A kubeconfig for `KUBECONFIG`."""
        path.write_text(
            json.dumps(
                {
                    "apiVersion": "v1", "kind": "Config", "current-context": "here",
                    "clusters": [{"name": "here", "cluster": {"server": self.url}}],
                    "users": [{"name": "guard", "user": {"token": "t"}}],
                    "contexts": [{"name": "here", "context": {"cluster": "here", "user": "guard"}}],
                }
            ),
            "utf-8",
        )  # fmt: skip
        return path

    # What a test or the harness does.

    def add_pod(
        self, name: str, *, owner: str = "rs-1", task_type: str = "echo", ready: bool = True, **metadata: Any
    ) -> Object:
        """Create a worker's pod, as a ReplicaSet does."""
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": name,
                "namespace": NAMESPACE,
                "uid": str(uuid.uuid4()),
                "creationTimestamp": _now(),
                "labels": {
                    "app.kubernetes.io/name": "inferq",
                    "app.kubernetes.io/component": "worker",
                    "inferq.dev/type": task_type,
                },
                "ownerReferences": [{"kind": "ReplicaSet", "name": owner, "uid": owner, "controller": True}],
                **metadata,
            },
            "spec": {"nodeName": "node", "containers": [{"name": "worker", "image": "inferq-echo"}]},
            "status": {"phase": "Running", "conditions": [{"type": "Ready", "status": str(ready)}]},
        }
        return self._put("pods", "ADDED", pod)

    def set_ready(self, name: str, ready: bool = True) -> None:
        def change(pod: Object) -> None:
            pod["status"]["conditions"] = [{"type": "Ready", "status": str(ready)}]

        self.change_pod(name, change)

    def change_pod(self, name: str, change: Callable[[Object], None]) -> None:
        with self._changed:
            pod = copy.deepcopy(self._objects["pods"][name])
            change(pod)
            self._put("pods", "MODIFIED", pod)

    def begin_deletion(self, name: str) -> None:
        """The pod is being deleted: its processes may still work."""
        self.change_pod(name, lambda pod: pod["metadata"].update(deletionTimestamp=_now()))

    def remove_pod(self, name: str) -> None:
        with self._changed:
            pod = self._objects["pods"].pop(name)
            self._note("DELETED", pod)

    def pod(self, name: str) -> Object:
        with self._changed:
            return self._objects["pods"][name]

    def cost(self, name: str) -> str | None:
        """The deletion cost of a pod; None if it has none."""
        annotations = self.pod(name)["metadata"].get("annotations") or {}
        found: str | None = annotations.get("controller.kubernetes.io/pod-deletion-cost")
        return found

    def lease(self) -> Object | None:
        with self._changed:
            return self._objects["leases"].get("scale-in-guard")

    def compact(self) -> None:
        """Forget all events. A watch from before ends with 410, too old."""
        with self._changed:
            self._version += 1
            self._floor = self._version
            self._events.clear()

    def cut_watches(self) -> None:
        """Break all watches, in the middle of a line."""
        with self._changed:
            self._epoch += 1
            self._changed.notify_all()

    def fail(
        self, method: str, part: str, status: int = 0, *, hang: float = 0.0, count: int = 1, **headers: str
    ) -> None:
        """Let the next `count` requests fail whose path has this part; `watch` is the part of a watch."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        error = Refused(status, **named) if status else None
        with self._changed:
            self.faults.append(Fault(method, part, error, hang, count))

    @property
    def watches(self) -> int:
        """How many watches there are."""
        return self._watches

    def patches(self, status: int = 200) -> list[Request]:
        """The patches that were answered with this status."""
        return [r for r in self.requests if (r.method, r.status) == ("PATCH", status)]

    # What the handler does.

    def _put(self, kind: str, event: str, thing: Object) -> Object:
        with self._changed:
            self._version += 1
            thing["metadata"]["resourceVersion"] = str(self._version)
            self._objects[kind][thing["metadata"]["name"]] = thing
            if kind == "pods":
                self._events.append((self._version, event, thing))
            self._changed.notify_all()
            return thing

    def _note(self, event: str, thing: Object) -> None:
        self._version += 1
        thing = copy.deepcopy(thing)
        thing["metadata"]["resourceVersion"] = str(self._version)
        self._events.append((self._version, event, thing))
        self._changed.notify_all()

    def fault_of(self, method: str, path: str) -> Fault | None:
        with self._changed:
            for fault in self.faults:
                if fault.method == method and fault.part in path:
                    fault.count -= 1
                    if not fault.count:
                        self.faults.remove(fault)
                    return fault
        return None

    def list_pods(self, selector: str) -> Object:
        with self._changed:
            items = [pod for pod in self._objects["pods"].values() if _selects(selector, pod)]
            version = str(self._version)
        return {
            "kind": "PodList",
            "apiVersion": "v1",
            "metadata": {"resourceVersion": version},
            "items": items,
        }

    def watch_pods(self, selector: str, since: int, seconds: float, bookmarks: bool) -> Iterator[Object]:
        """Events after the version `since`. Ends after `seconds`; raises ConnectionError if it is cut."""
        end = time.monotonic() + seconds
        with self._changed:
            epoch = self._epoch
            self._watches += 1
        try:
            while True:
                with self._changed:
                    if since >= self._floor and not any(event[0] > since for event in self._events):
                        self._changed.wait(min(self.bookmark_seconds, max(0.0, end - time.monotonic())))
                    version, expired = self._version, since < self._floor
                    if self._epoch != epoch or self._closed:
                        raise ConnectionError("the watch is cut")
                    found = [event for event in self._events if event[0] > since]
                if expired:
                    yield {"type": "ERROR", "object": Refused(410, "too old resource version").body()}
                    return
                for number, kind, pod in found:
                    since = number
                    if _selects(selector, pod):
                        yield {"type": kind, "object": pod}
                if not found and bookmarks:
                    since = version
                    bookmark = {"kind": "Pod", "metadata": {"resourceVersion": str(version)}}
                    yield {"type": "BOOKMARK", "object": bookmark}
                if time.monotonic() >= end:
                    return
        finally:
            with self._changed:
                self._watches -= 1

    def patch_pod(self, name: str, patch: Object) -> Object:
        with self._changed:
            old = self._get("pods", name)
            wanted = patch.get("metadata", {})
            for field_name in ("uid", "resourceVersion"):
                if wanted.get(field_name, old["metadata"][field_name]) != old["metadata"][field_name]:
                    raise Refused(409, f"the {field_name} in the precondition does not match")
            new = _merged(old, patch)
            if new == old:
                return old
            if why := self.admit(old, new):
                raise Refused(422, why)
            return self._put("pods", "MODIFIED", new)

    def read_lease(self, name: str) -> Object:
        with self._changed:
            return self._get("leases", name)

    def create_lease(self, lease: Object) -> Object:
        with self._changed:
            if lease["metadata"]["name"] in self._objects["leases"]:
                raise Refused(409, "already exists")
            return self._put("leases", "ADDED", lease)

    def replace_lease(self, name: str, lease: Object) -> Object:
        with self._changed:
            old = self._get("leases", name)
            if lease["metadata"].get("resourceVersion") != old["metadata"]["resourceVersion"]:
                raise Refused(409, "the object has been modified")
            return self._put("leases", "MODIFIED", lease)

    def _get(self, kind: str, name: str) -> Object:
        if name not in self._objects[kind]:
            raise Refused(404, f"{kind} {name} not found")
        return self._objects[kind][name]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_api: ApiServer

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def do_PATCH(self) -> None:
        self._serve()

    def _serve(self) -> None:
        api, url = self.server_api, urlsplit(self.path)
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        watches = query.get("watch", "").lower() == "true"
        fault = api.fault_of(self.command, url.path + ("?watch" if watches else ""))
        headers: dict[str, str] = {}
        try:
            if fault is not None and fault.hang:
                time.sleep(fault.hang)
            if fault is not None and fault.error is not None:
                raise fault.error
            if watches:
                self._watch(query)
                return
            status, answer = self._answer(url.path.split("/"), query, body)
        except Refused as refused:
            status, answer, headers = refused.status, refused.body(), refused.headers
        api.requests.append(Request(self.command, url.path, status, body))
        text = json.dumps(answer).encode()
        with suppress(OSError):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

    def _answer(self, parts: list[str], query: dict[str, str], body: Any) -> tuple[int, Object]:
        api = self.server_api
        match (self.command, *parts[1:]):
            case ("GET", "api", "v1", "namespaces", "inferq", "pods"):
                return 200, api.list_pods(query.get("labelSelector", ""))
            case ("PATCH", "api", "v1", "namespaces", "inferq", "pods", name):
                if "merge-patch" not in self.headers["Content-Type"]:
                    raise Refused(415, "only merge patches")
                return 200, api.patch_pod(name, body)
            case (method, "apis", "coordination.k8s.io", "v1", "namespaces", "inferq", "leases", *name):
                if method == "GET":
                    return 200, api.read_lease(name[0])
                if method == "POST":
                    return 201, api.create_lease(body)
                return 200, api.replace_lease(name[0], body)
        raise Refused(404, f"there is no {self.command} {self.path}")

    def _watch(self, query: dict[str, str]) -> None:
        events = self.server_api.watch_pods(
            query.get("labelSelector", ""),
            int(query["resourceVersion"]),
            float(query.get("timeoutSeconds", 600)),
            query.get("allowWatchBookmarks", "").lower() == "true",
        )
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            for event in events:
                self._chunk(json.dumps(event).encode() + b"\n")
            self._chunk(b"")
        except OSError:
            with suppress(OSError):
                self._chunk(b'{"type": "MODIFIED", "obj')
            self.close_connection = True
        finally:
            events.close()  # type: ignore[attr-defined]

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def log_message(self, *_arguments: object) -> None:
        return


def _selects(selector: str, thing: Object) -> bool:
    labels = thing["metadata"].get("labels") or {}
    wanted = [part.split("=", 1) for part in selector.split(",") if part]
    return all(labels.get(name) == value for name, value in wanted)


def _merged(old: Any, patch: Any) -> Any:
    """A merge patch, RFC 7396; for annotations a strategic merge patch is the same."""
    if not isinstance(patch, dict):
        return patch
    new = dict(old) if isinstance(old, dict) else {}
    for name, value in patch.items():
        if value is None:
            new.pop(name, None)
        else:
            new[name] = _merged(new.get(name), value)
    return new


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
