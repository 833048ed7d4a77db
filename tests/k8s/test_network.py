"""What network policies and the ingress let through."""

from __future__ import annotations

import ipaddress
import random
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from inferq.producer.gateway.app import create_app
from inferq.producer.gateway.settings import GatewaySettings
from inferq.storage import StorageSettings
from tests.k8s.manifests import Manifest, of_kind, render

PARTS = ("worker", "gateway", "callbacks", "batches", "beat", "monitor")
PRIVATE = (
    "0.0.0.0", "10.96.0.1", "100.100.1.1", "127.0.0.1", "169.254.169.254", "172.20.0.1", "192.0.0.1", "192.168.1.1",
    "198.18.0.1", "224.0.0.1", "239.1.1.1", "240.0.0.1", "255.255.255.255", "::1", "::ffff:10.0.0.1", "fd00::1",
    "fe80::1", "ff02::1", "64:ff9b::a00:1", "2001::1", "2001:db8::1", "2002:a00:1::",
)  # fmt: skip


@cache
def policies() -> tuple[Manifest, ...]:
    return tuple(of_kind(render("components/network-policy"), "NetworkPolicy").values())


def labels(part: str) -> dict[str, str]:
    return {"app.kubernetes.io/name": "inferq", "app.kubernetes.io/component": part}


def selects(selector: dict[str, Any], pod: dict[str, str]) -> bool:
    assert selector.keys() <= {"matchLabels"}
    return bool(selector.get("matchLabels", {}).items() <= pod.items())


def rules(pod: dict[str, str], direction: str) -> list[dict[str, Any]]:
    """The rules of one direction, `ingress` or `egress`, for a pod."""
    chosen = [each["spec"] for each in policies() if selects(each["spec"]["podSelector"], pod)]
    assert any(direction.capitalize() in spec["policyTypes"] for spec in chosen), (
        f"nothing restricts {direction}"
    )
    return [rule for spec in chosen for rule in spec.get(direction, [])]


def reaches(part: str, address: str, port: int, protocol: str = "TCP") -> bool:
    """Whether a part may connect to an address."""
    ip = ipaddress.ip_address(address)

    def within(block: dict[str, Any]) -> bool:
        networks = [ipaddress.ip_network(each) for each in (block["cidr"], *block.get("except", []))]
        return ip in networks[0] and not any(ip in each for each in networks[1:])

    return any(
        any(each["port"] == port and each.get("protocol", "TCP") == protocol for each in rule["ports"])
        and any("ipBlock" in peer and within(peer["ipBlock"]) for peer in rule["to"])
        for rule in rules(labels(part), "egress")
    )


@pytest.mark.parametrize("part", PARTS)
def test_the_internet_is_open_and_every_private_network_is_closed(part: str) -> None:
    for address in ("1.1.1.1", "93.184.216.34", "198.17.255.255", "198.20.0.0", "2606:4700::1111"):
        assert reaches(part, address, 443), address
        assert reaches(part, address, 80), address
        assert not reaches(part, address, 22), address
    assert [
        address for address in PRIVATE if any(reaches(part, address, port) for port in (80, 443, 5672))
    ] == []


def test_no_address_that_is_not_public_can_be_reached() -> None:
    chance = random.Random(1)
    for _ in range(3000):
        address = ipaddress.ip_address(chance.getrandbits(32))
        assert not reaches("worker", str(address), 443) or address.is_global, address


def test_names_are_resolved_by_the_clusters_dns_only() -> None:
    assert reaches("worker", "169.254.20.10", 53, "UDP")
    assert not reaches("worker", "1.1.1.1", 53, "UDP")
    assert not reaches("worker", "169.254.20.10", 80)
    peers = [
        peer for rule in rules(labels("worker"), "egress") for peer in rule["to"] if "podSelector" in peer
    ]
    selectors = [peer["podSelector"] for peer in peers]
    names = {name for each in selectors for name in each.get("matchLabels", {}).values()}
    names |= {
        name for each in selectors for rule in each.get("matchExpressions", []) for name in rule["values"]
    }
    assert names == {"kube-dns", "rabbitmq", "redis", "valkey", "seaweedfs"}


def callers(part: str) -> set[tuple[object, str]]:
    """The ports of a part, each with the namespace that may connect to it."""
    return {
        (port["port"], peer["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"])
        for rule in rules(labels(part), "ingress")
        for port in rule["ports"]
        for peer in rule["from"]
    }


def ingress() -> Manifest:
    return of_kind(render("components/ingress"), "Ingress")["gateway"]


def test_the_ingress_leads_to_every_route_that_asks_for_a_key_and_to_no_other(tmp_path: Path) -> None:
    (rule,) = ingress()["spec"]["rules"]
    paths = {each["path"]: each["pathType"] for each in rule["http"]["paths"]}
    assert paths == {"/v1": "Prefix", "/openapi.json": "Exact"}
    storage = StorageSettings(store_url=(tmp_path / "store").as_uri(), redis_url="redis://127.0.0.1:1/0")
    publisher: Any = SimpleNamespace()
    settings = GatewaySettings(api_keys_file=tmp_path / "keys.json")
    app = create_app(settings=settings, storage=storage, publisher=publisher)
    routes = set(app.openapi()["paths"])
    assert "/v1/tasks" in routes
    outside = {route for route in routes if not route.startswith("/v1/")}
    assert outside == {"/healthz", "/readyz", "/metrics"}


def test_the_ingress_lets_uploads_and_long_requests_through() -> None:
    annotations = ingress()["metadata"]["annotations"]
    prefix = "nginx.ingress.kubernetes.io/"
    settings = GatewaySettings()
    for size in (annotations[f"{prefix}proxy-body-size"], annotations["nginx.org/client-max-body-size"]):
        assert size.endswith("m")
        assert int(size[:-1]) * 2**20 >= settings.max_upload_bytes + 2**20
    for timeout in (annotations[f"{prefix}proxy-read-timeout"], annotations["nginx.org/proxy-read-timeout"]):
        assert int(timeout.removesuffix("s")) >= 300 > settings.events_heartbeat
    assert (annotations[f"{prefix}proxy-buffering"], annotations["nginx.org/proxy-buffering"]) == (
        "off",
        "False",
    )
    assert {host for tls in ingress()["spec"]["tls"] for host in tls["hosts"]} == {
        rule["host"] for rule in ingress()["spec"]["rules"]
    }


@pytest.mark.parametrize("part", PARTS)
def test_only_prometheus_reads_metrics_and_only_the_ingress_sends_requests(part: str) -> None:
    metrics = {("probes", "monitoring"), ("http", "monitoring")}
    assert callers(part) == metrics | ({("http", "ingress-nginx")} if part == "gateway" else set())
