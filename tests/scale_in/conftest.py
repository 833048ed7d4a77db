"""A guard in this process, between a stand-in of the API server and a real Redis."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from inferq.consumers.scale_in.api import connect
from inferq.consumers.scale_in.guard import ScaleInGuard
from inferq.consumers.scale_in.settings import ScaleInSettings
from inferq.schemas.monitor import WorkerInfo
from inferq.storage import StatusIndex, StorageSettings
from inferq.storage.workers import WorkerRegistry
from tests.scale_in.kubernetes_api import NAMESPACE, ApiServer


@pytest.fixture
def api() -> Iterator[ApiServer]:
    with ApiServer() as server:
        yield server


@dataclass
class Site:
    """The API server, what workers say, and the guards that are started."""

    api: ApiServer
    storage: StorageSettings
    index: StatusIndex
    guards: list[ScaleInGuard] = field(default_factory=list)
    threads: list[threading.Thread] = field(default_factory=list)

    def say(self, name: str, *, busy: bool = False, **fields: Any) -> None:
        """Send a heartbeat of the worker in the pod of this name."""
        info = WorkerInfo(
            worker_id=name, name=name, host="h", pid=1, task_type="echo", lanes=("normal",),
            state="busy" if busy else "idle", slots=1, busy=int(busy), version="0", since=datetime.now(UTC),
        )  # fmt: skip
        assert WorkerRegistry(self.index).beat(info.model_copy(update=fields), {})

    def guard(self, identity: str = "guard-1", *, storage: StorageSettings | None = None) -> ScaleInGuard:
        """Start a guard."""
        settings = ScaleInSettings(scale_in_interval=0.02)
        made = ScaleInGuard(
            settings, storage or self.storage, connect(), namespace=NAMESPACE, identity=identity
        )
        thread = threading.Thread(target=made.run)
        thread.start()
        self.guards.append(made)
        self.threads.append(thread)
        return made

    def stop(self) -> None:
        """End all guards in good order."""
        for guard in self.guards:
            guard.stop()
        for thread in self.threads:
            thread.join(30)
        assert not any(thread.is_alive() for thread in self.threads)

    def costs(self, *names: str) -> list[str | None]:
        return [self.api.cost(name) for name in names]


@pytest.fixture
def site(api: ApiServer, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv("KUBECONFIG", str(api.write_kubeconfig(tmp_path / "kubeconfig")))
    storage = StorageSettings(redis_url=redis_url.removesuffix("/0") + "/7")
    index = StatusIndex.from_settings(storage)
    index.write(lambda client: client.flushdb())
    made = Site(api, storage, index)
    yield made
    made.stop()
    index.close()
