"""Who sees the records of how tasks ended: in the folder, on their way to S3, and in the status events."""

from __future__ import annotations

import hashlib
import json
import os
import random
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import redis

from inferq.schemas import END_STATES
from tests.chaos.ledger import Ledger

_RECORDS = ("result.json", "failure.json")


def note_record(ledger: Ledger, path: str, data: bytes, *, seen_by: str) -> None:
    """Enter the record that `path` (`.../<task id>/result.json` or `failure.json`) was found to hold."""
    folder, _, name = path.rpartition("/")
    if name not in _RECORDS:
        return
    task = folder.rpartition("/")[2]
    digest = hashlib.sha256(data).hexdigest()[:12]
    record = json.loads(data)
    if name == "result.json":
        ledger.note("result", task, run=_run(record), what=seen_by, content=digest)
        if record.get("attempts", 1) > 1:
            ledger.note("attempts", task, what=str(record["attempts"]))
    else:
        ledger.note("failure", task, what=record["error"]["code"], content=digest)


def _run(record: dict[str, Any]) -> str:
    output = record.get("output")
    return str(output.get("run", "")) if isinstance(output, dict) else ""


class Watcher(threading.Thread):
    """A thread that looks again and again until it is stopped; `stop` looks once more."""

    def __init__(self, name: str, pause: float) -> None:
        super().__init__(name=name, daemon=True)
        self._pause = pause
        self._stopping = threading.Event()

    def look(self) -> None:
        raise NotImplementedError

    def run(self) -> None:
        while not self._stopping.wait(self._pause):
            self.look()

    def stop(self) -> None:
        self._stopping.set()
        self.join()
        self.look()


class FolderWatch(Watcher):
    """Watches a local store: enters every record when it first stands there, and whenever it is another."""

    def __init__(self, ledger: Ledger, root: Path) -> None:
        super().__init__("folder watch", 0.1)
        self._ledger = ledger
        self._tasks = root / "tasks" / "default"
        self._known: dict[str, tuple[int, int, int]] = {}

    def look(self) -> None:
        with suppress(FileNotFoundError), os.scandir(self._tasks) as tasks:
            for task in tasks:
                for name in _RECORDS:
                    self._look_at(f"{task.path}/{name}")

    def _look_at(self, path: str) -> None:
        with suppress(FileNotFoundError):
            found = os.stat(path)  # noqa: PTH116 - a Path for each would cost more than the call
            identity = (found.st_ino, found.st_mtime_ns, found.st_size)
            if self._known.get(path) != identity:
                self._known[path] = identity
                note_record(self._ledger, path, Path(path).read_bytes(), seen_by="folder")


class EventWatch(Watcher):
    """Listens to the status events of all tasks; what is told while Redis is away is not heard."""

    def __init__(self, ledger: Ledger, url: str) -> None:
        super().__init__("event watch", 0.1)
        self._ledger = ledger
        self._redis = redis.Redis.from_url(url, socket_timeout=5, socket_connect_timeout=5)
        self._subscription = self._redis.pubsub(ignore_subscribe_messages=True)  # type: ignore[no-untyped-call]
        self._subscribed = False

    def look(self) -> None:
        try:
            if not self._subscribed:
                self._subscription.psubscribe("inferq:events:*")
                self._subscribed = True
            while message := self._subscription.get_message(timeout=0.05):
                self._enter(json.loads(message["data"]))
        except (redis.RedisError, OSError):
            # The connection remembers its subscription; Redis may have forgotten it.
            self._subscribed = False
            with suppress(redis.RedisError, OSError):
                self._subscription.reset()

    def stop(self) -> None:
        super().stop()
        self._subscription.close()
        self._redis.close()

    def _enter(self, event: dict[str, Any]) -> None:
        data = event["data"]
        if data["state"] in END_STATES:
            self._ledger.note("event", data["task_id"], run=_run(data), what=event["type"])


class Asker(Watcher):
    """Asks the gateway about those of the tasks that it accepted, and notes each that it says does not exist."""

    def __init__(self, ledger: Ledger, gateway: httpx.Client, tasks: Iterable[str]) -> None:
        super().__init__("asker", 0.1)
        self._ledger = ledger
        self._gateway = gateway
        self._tasks = frozenset(tasks)

    def look(self) -> None:
        known = sorted(self._ledger.confirmed() & self._tasks)
        # Those that were accepted last have not ended: nothing but the record tells of them.
        for task in {*random.sample(known, min(1, len(known))), *known[-2:]}:
            with suppress(httpx.HTTPError):
                self._ask(task)

    def _ask(self, task: str) -> None:
        answer = self._gateway.get(f"/v1/tasks/{task}")
        if answer.status_code == 404:
            self._ledger.note("denied", task, what="GET, 404")
