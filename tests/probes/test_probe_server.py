"""The probes answer whatever their other clients do."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import httpx
import pytest

from inferq.producer.up.part import free_ports
from inferq.schemas import InstallationError
from inferq.schemas.probe_server import REQUEST_SECONDS, ProbeServer, Readiness
from tests.forked import ForkedPart
from tests.waiting import eventually


def probes_at(host: str, *, seconds: float = REQUEST_SECONDS) -> ProbeServer:
    server = ProbeServer(host, 0, readiness=lambda: Readiness(False, ("Redis",)), seconds=seconds)
    server.start()
    return server


@pytest.fixture
def probes() -> Iterator[ProbeServer]:
    server = probes_at("127.0.0.1")
    yield server
    server.close()


def answers(probes: ProbeServer, host: str = "127.0.0.1") -> bool:
    """Whether a probe is answered sooner than the 5 s after which a silent client is cut off."""
    return httpx.get(f"http://{host}:{probes.port}/healthz", timeout=4).status_code == 200


def connected(probes: ProbeServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", probes.port), timeout=10)


def test_silent_clients_in_any_number_delay_nothing(probes: ProbeServer) -> None:
    with ExitStack() as stack:
        silent = [stack.enter_context(connected(probes)) for _ in range(100)]
        assert answers(probes)
        assert silent[0].recv(1) == b""  # the oldest made room
        assert answers(probes)


def test_a_client_that_drips_is_cut_off_in_time() -> None:
    with closing(probes_at("127.0.0.1", seconds=0.3)) as probes, connected(probes) as dripping:
        began = time.monotonic()

        def dripped() -> bool:
            try:
                dripping.sendall(b"G")
            except OSError:
                return True
            return False

        assert answers(probes)
        eventually(dripped, seconds=4)
        assert time.monotonic() - began >= 0.3


def test_head_is_answered_and_nothing_else_but_get(probes: ProbeServer) -> None:
    url = f"http://127.0.0.1:{probes.port}"
    head = httpx.head(f"{url}/readyz", timeout=60)
    assert (head.status_code, head.content) == (503, b"")
    assert httpx.head(f"{url}/healthz", timeout=60).status_code == 200
    refused = httpx.post(f"{url}/healthz", timeout=60)
    assert (refused.status_code, refused.headers["allow"]) == (405, "GET, HEAD")
    assert httpx.get(f"{url}/readyz", timeout=60).json() == {"ready": False, "waiting_for": ["Redis"]}


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine has no IPv6")
def test_they_listen_on_ipv6_and_on_every_address() -> None:
    every, own = probes_at("::"), probes_at("::1")
    assert answers(every)
    assert answers(every, "[::1]")
    assert answers(own, "[::1]")
    every.close()
    own.close()


def test_an_address_that_cannot_be_listened_on_names_its_settings(probes: ProbeServer) -> None:
    for host, port in (("127.0.0.1", probes.port), ("192.0.2.1", 0), ("no-such-host.invalid", 0)):
        with pytest.raises(InstallationError, match="INFERQ_PROBE_HOST and INFERQ_PROBE_PORT"):
            ProbeServer(host, port, readiness=lambda: Readiness(True))


def alone(folder: Path) -> dict[str, str]:
    """The environment of a part that reaches no service but a store in the folder."""
    (folder / "schedules.toml").touch()
    return os.environ | {
        "INFERQ_AMQP_URL": "amqp://guest:guest@127.0.0.1:1",
        "INFERQ_REDIS_URL": "redis://127.0.0.1:1/0",
        "INFERQ_STORE_URL": (folder / "store").as_uri(),
        "INFERQ_API_KEYS_FILE": str(folder / "keys.json"),
        "INFERQ_SCHEDULES_FILE": str(folder / "schedules.toml"),
        "INFERQ_GATEWAY_HOST": "127.0.0.1",
    }


@pytest.mark.parametrize(
    ("part", "setting"),
    [
        (["worker", "echo"], "INFERQ_PROBE_PORT"), (["callbacks"], "INFERQ_PROBE_PORT"),
        (["beat"], "INFERQ_PROBE_PORT"), (["gateway"], "INFERQ_GATEWAY_PORT"),
    ],
    ids=["worker", "callbacks", "beat", "gateway"],
)  # fmt: skip
def test_a_part_whose_port_is_taken_ends_at_once_and_names_the_setting_and_the_port(
    tmp_path: Path, probes: ProbeServer, part: list[str], setting: str
) -> None:
    env = alone(tmp_path) | {setting: str(probes.port)}
    process = ForkedPart(*part, env=env, log=tmp_path / "log")
    assert process.wait(60) == 1
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    (error,) = [line["message"] for line in lines if line["level"] in ("ERROR", "CRITICAL")]
    assert f"cannot listen on 127.0.0.1:{probes.port}: Address already in use" in error
    assert setting in error


def test_beat_serves_its_metrics(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    process = ForkedPart("beat", env=alone(tmp_path) | {"INFERQ_PROBE_PORT": str(port)})

    def metrics() -> str:
        assert process.poll() is None
        with suppress(httpx.TransportError):
            return httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=5, verify=False).text
        return ""

    try:
        assert "# TYPE inferq_beat_runs_total counter" in eventually(metrics)
    finally:
        process.kill()
        process.wait(30)
