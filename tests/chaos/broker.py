"""The brokers that scenarios hurt: a node, a cluster, or whatever else keeps to the same interface."""

from __future__ import annotations

import os
import secrets
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import httpx

from inferq.broker import BrokerSettings, Topology, connect, work_queue
from inferq.producer.up.part import Part, free_ports, private_text
from inferq.producer.up.rabbitmq import USER, RabbitNode, RabbitPorts
from tests.chaos.processes import Crew, Process
from tests.waiting import eventually

_SETTLED_SECONDS = 2.0
_JOIN_SECONDS = 60.0


class Broker(Protocol):
    """A RabbitMQ of one node or more. Data and ports are kept between `kill` and `start`."""

    @property
    def version(self) -> str: ...

    def start(self) -> None:
        """Start what does not run; returns once it serves."""

    def kill(self, vhost: str) -> None:
        """SIGKILL to the node on which this virtual host depends most."""

    def url(self, vhost: str) -> str:
        """The AMQP URL, several nodes separated by commas."""

    def ctl(self, *arguments: str) -> str:
        """Run `rabbitmqctl` and give what it printed."""

    def add_vhost(self, name: str, topology: Topology) -> None:
        """Make a virtual host that has this topology, and whose retry levels wait no longer than a second."""

    def remove_vhost(self, name: str) -> None: ...

    def set_policy(self, vhost: str, name: str, pattern: str, definition: Mapping[str, object]) -> None:
        """Have this policy govern the queues whose names match."""

    def clear_policy(self, vhost: str, name: str) -> None: ...


@dataclass
class _Member:
    name: str
    node: RabbitNode
    part: Part
    process: Process | None = None

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.ended is None


class PrivateRabbit:
    """One private node, or several in a cluster; `home` is the folder of a RabbitMQ that is not installed."""

    def __init__(self, crew: Crew, folder: Path, *, nodes: int = 1, home: Path | None = None) -> None:
        self._crew = crew
        (epmd,) = free_ports(1)
        shared = secrets.token_urlsafe(24), secrets.token_hex(20)
        names = [f"chaos{number}@localhost" for number in range(nodes)]
        with _rabbitmq_home(home):
            self._members = [
                _member(folder / name, name, names, shared, replace(RabbitPorts(*free_ports(5)), epmd=epmd))
                for name in names
            ]
        self._epmd = self._members[0].node.parts()[0]
        self._epmd_process: Process | None = None
        self._declared_at = 0.0

    @property
    def version(self) -> str:
        return str(self._ask("GET", "/overview")["rabbitmq_version"])

    def start(self) -> None:
        if self._epmd_process is None:
            self._epmd_process = self._crew.start(self._epmd)
            self._epmd_process.wait_ready()
        # All at once: RabbitMQ 4 waits for the other nodes of its cluster before it serves.
        for member in self._members:
            if not member.running:
                member.process = self._crew.start(member.part)
        for member in self._members:
            assert member.process is not None
            member.process.wait_ready()
        if len(self._members) > 1:
            eventually(self._complete, "a cluster whose queues have all their members", seconds=_JOIN_SECONDS)

    def kill(self, vhost: str) -> None:
        # RabbitMQ 3.10 brings the names of new quorum queues to disk up to a second late, and never serves
        # those again whose names were lost: publishes to them are refused after a minute.
        time.sleep(max(0.0, self._declared_at + _SETTLED_SECONDS - time.monotonic()))
        member = self._members[0]
        if len(self._members) > 1:
            leader = self._ask("GET", f"/queues/{vhost}/{work_queue('witness')}").get("leader")
            member = next((m for m in self._members if m.name == leader and m.running), member)
        assert member.process is not None
        member.process.kill()

    def url(self, vhost: str) -> str:
        return ",".join(member.node.url_of(vhost) for member in self._members)

    def ctl(self, *arguments: str) -> str:
        member = self._members[0]
        done = subprocess.run(
            [str(member.node.server.with_name("rabbitmqctl")), *arguments],
            env=dict(member.part.env),
            cwd=member.node.folder,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"rabbitmqctl {' '.join(arguments)}: {done.stdout}{done.stderr}")
        return done.stdout

    def add_vhost(self, name: str, topology: Topology) -> None:
        self._ask("PUT", f"/vhosts/{name}", {})
        everything = {"configure": ".*", "write": ".*", "read": ".*"}
        self._ask("PUT", f"/permissions/{name}/{USER}", everything)
        # Of a queue's own time to live and a policy's the shorter holds.
        self.set_policy(name, "hurry", r"^inference\.retry\.", {"message-ttl": 1000})
        connection = connect(BrokerSettings(amqp_url=self.url(name)), name="chaos")
        topology.apply(connection.channel())
        connection.close()
        self._declared_at = time.monotonic()

    def remove_vhost(self, name: str) -> None:
        self._ask("DELETE", f"/vhosts/{name}")

    def set_policy(self, vhost: str, name: str, pattern: str, definition: Mapping[str, object]) -> None:
        policy = {"pattern": pattern, "apply-to": "queues", "definition": definition}
        self._ask("PUT", f"/policies/{vhost}/{name}", policy)

    def clear_policy(self, vhost: str, name: str) -> None:
        self._ask("DELETE", f"/policies/{vhost}/{name}")

    def _complete(self) -> bool:
        """Whether every node runs in the cluster, and every queue has a member on each."""
        count = len(self._members)
        try:
            running = [node["running"] for node in self._ask("GET", "/nodes")]
            queues = self._ask("GET", "/queues")
        except httpx.HTTPError:
            return False
        return sum(running) == count and all(len(queue.get("online", ())) == count for queue in queues)

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """A call of the management API, on the first node that runs."""
        node = next(member.node for member in self._members if member.running)
        answer = httpx.request(
            method, f"{node.management_url}/api{path}", json=body, auth=(USER, node.password), timeout=30
        )
        return answer.raise_for_status().json() if answer.content else None


def _member(
    folder: Path, name: str, names: list[str], shared: tuple[str, str], ports: RabbitPorts
) -> _Member:
    """Prepare one node; `shared` are the password and the cookie of all."""
    password, cookie = shared
    private_text(folder / "password", password)
    private_text(folder / "home" / ".erlang.cookie", cookie)
    node = RabbitNode.prepare(folder, ports)
    if len(names) > 1:
        configuration = folder / "rabbitmq.conf"
        lines = ["cluster_partition_handling = pause_minority"]
        lines += ["cluster_formation.peer_discovery_backend = classic_config"]
        lines += [f"cluster_formation.classic_config.nodes.{n} = {other}" for n, other in enumerate(names, 1)]
        private_text(configuration, configuration.read_text("utf-8") + "\n".join(lines) + "\n")
    part = node.parts()[1]
    return _Member(name, node, replace(part, name=name, env={**part.env, "RABBITMQ_NODENAME": name}))


@contextmanager
def _rabbitmq_home(home: Path | None) -> Iterator[None]:
    before = os.environ.get("RABBITMQ_HOME")
    if home is not None:
        os.environ["RABBITMQ_HOME"] = str(home)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("RABBITMQ_HOME", None)
        else:
            os.environ["RABBITMQ_HOME"] = before


def through(url: str, ports: Mapping[int, int]) -> str:
    """The AMQP URL with each node's port replaced: `ports` gives the proxy's for the node's."""
    nodes = []
    for one in url.split(","):
        parts = urlsplit(one)
        assert parts.port
        netloc = parts.netloc.replace(f":{parts.port}", f":{ports[parts.port]}")
        nodes.append(parts._replace(netloc=netloc).geturl())
    return ",".join(nodes)


def ports_of(url: str) -> list[int]:
    """The ports of an AMQP URL's nodes."""
    return [urlsplit(one).port or 5672 for one in url.split(",")]
