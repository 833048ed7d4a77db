"""A private Redis as an ordinary process: its own port, password and data, on loopback only."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import redis

from inferq.producer.up.part import LOOPBACK, Part, find_program, kept_secret, port_answers, private_text
from inferq.schemas import InstallationError
from inferq.schemas.memory import total_memory


@dataclass(frozen=True)
class RedisServer:
    """A server with its files under `folder`. Raises InstallationError if Redis is not installed."""

    folder: Path
    port: int
    password: str
    server: Path

    @classmethod
    def prepare(cls, folder: Path, port: int) -> RedisServer:
        """Write the server's configuration under `folder`; data of an earlier run is kept."""
        server = find_server()
        folder = folder.resolve()
        (folder / "data").mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        made = cls(folder, port, kept_secret(folder / "password"), server)
        private_text(folder / "redis.conf", made._configuration())
        return made

    @property
    def url(self) -> str:
        """The Redis URL, password included, of database 0."""
        return f"redis://:{self.password}@{LOOPBACK}:{self.port}/0"

    def part(self) -> Part:
        return Part(
            name="redis",
            # The configuration uses a relative folder: Redis cannot quote every path.
            argv=(str(self.server), "redis.conf"),
            env=dict(os.environ),
            probe=self._probe,
            stop_rank=20,
            grace=15,
            start_limit=60,
            folder=self.folder,
        )

    def _probe(self) -> str | None:
        refused = port_answers(self.port)
        return refused if refused is not None else ping(self.url)

    def _configuration(self) -> str:
        # The status is only an index: a second of it may be lost if the machine stops. Dropped keys would lose cancels
        # and the counts of runs, so a full Redis refuses writes, which the parts report, before the machine is full.
        # Every key expires, so a quarter of the memory suffices for a week of tasks.
        return f"""\
bind {LOOPBACK}
port {self.port}
protected-mode yes
requirepass {self.password}
daemonize no
supervised no
dir ./data
appendonly yes
appendfsync everysec
save ""
maxmemory {total_memory() // 4}
maxmemory-policy noeviction
"""


def ping(url: str, *, seconds: float = 3.0) -> str | None:
    """Why the Redis at `url` does not answer PING within `seconds`; None if it does."""
    client = redis.Redis.from_url(url, socket_timeout=seconds, socket_connect_timeout=seconds)
    try:
        client.ping()
    except (redis.RedisError, OSError) as error:
        return f"Redis: {error}"
    finally:
        client.close()
    return None


def find_server() -> Path:
    """The redis-server program, or Valkey's equivalent."""
    found = find_program("redis-server") or find_program("valkey-server")
    if found is None:
        raise InstallationError(
            "redis-server is not installed; install it with: "
            "sudo apt-get install -y --no-install-recommends redis-server; or use one that runs elsewhere: "
            "export INFERQ_REDIS_URL=redis://host:6379/0",
            code="redis_missing",
        )
    return found
