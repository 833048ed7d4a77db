"""An object store that hangs, and does not fail, delays nobody for longer than a deadline."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from inferq.producer.gateway import services as services_module
from inferq.producer.gateway.services import Services
from inferq.producer.gateway.threads import Threads
from inferq.storage.objects.store import StoreOutage
from tests.gateway.conftest import FakePublisher, running


@pytest.fixture
def released() -> Iterator[threading.Event]:
    released = threading.Event()
    yield released
    released.set()


async def test_a_call_is_abandoned_at_its_deadline_and_a_waiting_one_is_never_made(
    released: threading.Event,
) -> None:
    threads = Threads(2, name="the store", seconds=0.2, outage=StoreOutage)
    made: list[int] = []

    def hang(number: int) -> None:
        made.append(number)
        released.wait(20)

    began = time.monotonic()
    calls = [threads.run(lambda number=number: hang(number)) for number in range(6)]
    ended = await asyncio.gather(*calls, return_exceptions=True)
    assert time.monotonic() - began < 10
    assert [type(each) for each in ended] == [StoreOutage] * 6
    assert "the store did not answer within 0.2 s" in str(ended[0])
    released.set()
    assert await threads.run(lambda: "answer") == "answer"
    assert made == [0, 1]
    with pytest.raises(TimeoutError, match="its own"):
        await threads.run(_time_out)
    threads.close()


def _time_out() -> None:
    raise TimeoutError("its own")


def test_everything_is_answered_though_the_store_hangs(
    tmp_path: Path,
    redis_url: str,
    publisher: FakePublisher,
    monkeypatch: pytest.MonkeyPatch,
    released: threading.Event,
) -> None:
    monkeypatch.setattr(services_module, "PING_SECONDS", 0.3)
    with running(tmp_path, redis_url=redis_url, publisher=publisher, gateway_store_timeout=0.5) as gateway:
        services: Services = gateway.server.config.app.state.services  # type: ignore[union-attr]
        task = gateway.began("known")
        with monkeypatch.context() as hung:
            for owner, name in ((services.results, "load"), (services.store, "ping")):
                hung.setattr(owner, name, lambda *_: released.wait(20) and None)

            def get(path: str, **headers: str) -> tuple[int, float]:
                began = time.monotonic()
                status = gateway.http.get(path, headers=headers).status_code
                return status, time.monotonic() - began

            with ThreadPoolExecutor(8) as pool:
                # Far more than there are threads for the store.
                results = list(pool.map(get, ["/v1/tasks/unknown/result"] * 80))
            assert {status for status, _ in results} == {503}
            for path, headers, expected in (
                ("/readyz", {}, 503),
                ("/healthz", {}, 200),
                ("/v1/tasks/known", {"Prefer": "wait=1"}, 200),
                ("/v1/tasks/unknown/events", {}, 503),
            ):
                status, seconds = get(path, **headers)
                assert (path, status) == (path, expected)
                assert seconds < 8, path
        released.set()
        gateway.end(task)
        assert gateway.http.get("/v1/tasks/known/result").status_code == 200


def test_the_probes_answer_head(tmp_path: Path, redis_url: str, publisher: FakePublisher) -> None:
    with running(tmp_path, redis_url=redis_url, publisher=publisher) as gateway:
        for path in ("/healthz", "/readyz", "/metrics"):
            answer = gateway.http.head(path)
            assert (path, answer.status_code, answer.content) == (path, 200, b"")
