"""The brokers that scenarios hurt: a node, or whatever else keeps to the same interface."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

import httpx

from broker import BrokerSettings, Topology, connect
from producer.up.part import free_ports
from producer.up.rabbitmq import USER, RabbitNode, RabbitPorts
from tests.chaos.processes import Crew, Process

_SETTLED_SECONDS = 2.0


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


class SingleNode:
    """One private node."""

    def __init__(self, crew: Crew, folder: Path) -> None:
        self._crew = crew
        self._node = RabbitNode.prepare(folder, RabbitPorts(*free_ports(5)))
        self._epmd, self._rabbitmq = self._node.parts()
        self._running: dict[str, Process] = {}
        self.management = httpx.Client(
            base_url=f"{self._node.management_url}/api", auth=(USER, self._node.password), timeout=30
        )
        self._declared_at = 0.0

    @property
    def version(self) -> str:
        version: str = self.management.get("/overview").raise_for_status().json()["rabbitmq_version"]
        return version

    def start(self) -> None:
        for part in (self._epmd, self._rabbitmq):
            process = self._running.get(part.name)
            if process is None or process.ended is not None:
                process = self._running[part.name] = self._crew.start(part)
            process.wait_ready()

    def kill(self, vhost: str) -> None:
        # RabbitMQ 3.10 brings the names of new quorum queues to disk up to a second late, and never serves
        # those again whose names were lost: publishes to them are refused after a minute.
        time.sleep(max(0.0, self._declared_at + _SETTLED_SECONDS - time.monotonic()))
        self._running[self._rabbitmq.name].kill()

    def url(self, vhost: str) -> str:
        return self._node.url_of(vhost)

    def ctl(self, *arguments: str) -> str:
        program = self._node.server.with_name("rabbitmqctl")
        done = subprocess.run(
            [str(program), *arguments],
            env=dict(self._rabbitmq.env),
            cwd=self._node.folder,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"rabbitmqctl {' '.join(arguments)}: {done.stdout}{done.stderr}")
        return done.stdout

    def add_vhost(self, name: str, topology: Topology) -> None:
        self._put(f"/vhosts/{name}", {})
        self._put(f"/permissions/{name}/{USER}", {"configure": ".*", "write": ".*", "read": ".*"})
        # Of a queue's own time to live and a policy's the shorter holds.
        self._put(
            f"/policies/{name}/hurry",
            {"pattern": r"^inference\.retry\.", "apply-to": "queues", "definition": {"message-ttl": 1000}},
        )

        connection = connect(BrokerSettings(amqp_url=self.url(name)), name="chaos")
        topology.apply(connection.channel())
        connection.close()
        self._declared_at = time.monotonic()

    def remove_vhost(self, name: str) -> None:
        self.management.delete(f"/vhosts/{name}").raise_for_status()

    def _put(self, path: str, body: dict[str, object]) -> None:
        self.management.put(path, json=body).raise_for_status()


def through(url: str, ports: dict[int, int]) -> str:
    """The AMQP URL with each node's port replaced: `ports` gives the proxy's for the node's."""
    nodes = []
    for one in url.split(","):
        parts = urlsplit(one)
        assert parts.port
        nodes.append(
            parts._replace(netloc=parts.netloc.replace(f":{parts.port}", f":{ports[parts.port]}")).geturl()
        )
    return ",".join(nodes)


def ports_of(url: str) -> list[int]:
    """The ports of an AMQP URL's nodes."""
    return [urlsplit(one).port or 5672 for one in url.split(",")]
