"""What the gateway's log says of its readiness."""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace
from typing import Any

import pytest

from inferq.producer.gateway import health
from inferq.schemas import Outage


async def test_an_outage_is_one_warning_however_often_readiness_is_asked(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(health, "_CACHE_SECONDS", -1.0)
    caplog.set_level(logging.INFO)
    faults: dict[str, str] = {}

    async def ping(service: str) -> None:
        if service in faults:
            raise Outage(faults[service])

    services: Any = SimpleNamespace(
        ping_store=lambda: ping("store"),
        ping_redis=lambda: ping("redis"),
        publisher=SimpleNamespace(connected=True, blocked_reason=None),
        closing=asyncio.Event(),
    )
    probe = health.ReadinessProbe(services)

    async def asked() -> set[str]:
        return {(await probe.readiness()).status for _ in range(3)}

    faults["redis"] = "Redis refuses writes"
    assert await asked() == {"degraded"}
    faults["store"] = "the disk is full"
    assert await asked() == {"unavailable"}
    faults["store"] = "the disk failed"
    assert await asked() == {"unavailable"}
    faults.clear()
    assert await asked() == {"ready"}
    faults["redis"] = "Redis refuses writes"
    assert await asked() == {"degraded"}
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "not ready: Redis refuses writes"),
        ("WARNING", "not ready: the disk is full"),
        ("WARNING", "not ready: the disk failed"),
        ("INFO", "object store is available again"),
        ("INFO", "Redis is available again"),
        ("WARNING", "not ready: Redis refuses writes"),
    ]
