"""A private RabbitMQ node as an ordinary process: its own ports, user and data, on loopback only.

RabbitMQ's environment variables: https://www.rabbitmq.com/docs/configure#supported-environment-variables
"""

from __future__ import annotations

import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pika
import pika.exceptions
from pika.adapters.utils.connection_workflow import AMQPConnectorException

from inferq.broker.lanes import HOLD_SECONDS
from inferq.producer.up.part import LOOPBACK, Part, find_program, kept_secret, port_answers, private_text
from inferq.schemas import InstallationError

USER = "inferq"


@dataclass(frozen=True)
class RabbitPorts:
    """The loopback ports of one node."""

    amqp: int
    management: int
    prometheus: int
    distribution: int
    epmd: int


@dataclass(frozen=True)
class RabbitNode:
    """A node with its files under `folder`. Raises InstallationError if RabbitMQ is not installed."""

    folder: Path
    ports: RabbitPorts
    password: str
    server: Path
    epmd: Path

    @classmethod
    def prepare(cls, folder: Path, ports: RabbitPorts) -> RabbitNode:
        """Write the node's configuration under `folder`; data of an earlier run is kept.

        Raises InstallationError (`data_moved`) if that data was made in another place.
        """
        server, epmd = find_server(), find_epmd()
        folder = folder.resolve()
        _check_place(folder)
        for name in ("home", "mnesia", "log", "generated"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        _write_cookie(folder / "home" / ".erlang.cookie")
        node = cls(folder, ports, kept_secret(folder / "password"), server, epmd)
        private_text(folder / "rabbitmq.conf", node._configuration())
        private_text(folder / "enabled_plugins", "[rabbitmq_management,rabbitmq_prometheus].\n")
        return node

    @property
    def url(self) -> str:
        """The AMQP URL, credentials included, of the default virtual host."""
        return self.url_of("/")

    def url_of(self, vhost: str) -> str:
        """The AMQP URL, credentials included, of this virtual host."""
        return f"amqp://{USER}:{self.password}@{LOOPBACK}:{self.ports.amqp}/{quote(vhost, safe='')}"

    @property
    def management_url(self) -> str:
        return f"http://{LOOPBACK}:{self.ports.management}"

    def parts(self) -> tuple[Part, Part]:
        """The port mapper, which Erlang would otherwise leave behind as a daemon, and the node itself."""
        env = self._environment()
        epmd = Part(
            name="epmd",
            argv=(str(self.epmd), "-port", str(self.ports.epmd), "-address", LOOPBACK),
            env=env,
            probe=lambda: port_answers(self.ports.epmd),
            stop_rank=40,
            grace=2,
            start_limit=10,
            folder=self.folder,
        )
        rabbitmq = Part(
            name="rabbitmq",
            argv=(str(self.server),),
            env=env,
            probe=self._probe,
            needs=("epmd",),
            stop_rank=30,
            grace=30,
            start_limit=120,
            folder=self.folder,
            # RabbitMQ 3.10 writes the names of new quorum queues to disk about a second late: a node that
            # is killed before that never serves those queues again.
            gentle=True,
        )
        return epmd, rabbitmq

    def _probe(self) -> str | None:
        # The listeners open last of all; pika would log each refused connection as an error.
        refused = port_answers(self.ports.amqp)
        return refused if refused is not None else handshake(self.url)

    def _environment(self) -> dict[str, str]:
        # Keep the settings of another node on this machine out of this one.
        foreign = ("RABBITMQ_", "ERL_", "EPMD_", "NOTIFY_SOCKET", "LC_")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        return inherited | {
            "HOME": str(self.folder / "home"),
            "LANG": "C.UTF-8",
            "LC_ALL": "C.UTF-8",
            "ERL_CRASH_DUMP_SECONDS": "0",
            "ERL_EPMD_PORT": str(self.ports.epmd),
            "ERL_EPMD_ADDRESS": LOOPBACK,
            "RABBITMQ_NODENAME": "inferq@localhost",
            "RABBITMQ_MNESIA_BASE": str(self.folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(self.folder / "log"),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_CONFIG_FILE": str(self.folder / "rabbitmq.conf"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(self.folder / "advanced.config"),
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.folder / "enabled_plugins"),
            "RABBITMQ_GENERATED_CONFIG_DIR": str(self.folder / "generated"),
            "RABBITMQ_DIST_PORT": str(self.ports.distribution),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            # The script becomes the Erlang VM instead of waiting for it: signals reach the VM itself,
            # which stops cleanly on SIGTERM.
            "RUNNING_UNDER_SYSTEMD": "1",
        }

    def _configuration(self) -> str:
        return f"""\
listeners.tcp.1 = {LOOPBACK}:{self.ports.amqp}
management.tcp.ip = {LOOPBACK}
management.tcp.port = {self.ports.management}
prometheus.tcp.ip = {LOOPBACK}
prometheus.tcp.port = {self.ports.prometheus}
default_user = {USER}
default_pass = {self.password}
default_vhost = /
consumer_timeout = {HOLD_SECONDS * 1000}
log.console = true
log.console.level = warning
"""


def _write_cookie(file: Path) -> None:
    """Write a cookie that cannot be guessed. It is the password for running code in the node.

    Erlang makes a missing one from the time at which it starts: 20 capital letters. Such a one is replaced.
    """
    if not file.exists() or re.fullmatch(r"[A-Z]{20}", file.read_text()):
        private_text(file, secrets.token_urlsafe(32))
    file.chmod(0o400)  # Erlang refuses a cookie that others may read, as after a copy of the folder


def _check_place(folder: Path) -> None:
    # Quorum queues keep the absolute path of their data: in a moved folder they are not served, and a copied
    # folder would write to the original.
    note = folder / "place"
    if not (folder / "mnesia").exists():
        private_text(note, f"{folder}\n")
    elif note.exists() and (place := note.read_text(encoding="utf-8").strip()) != str(folder):
        raise InstallationError(
            f"RabbitMQ's data in {folder} was made in {place} and only works there; move it back, or remove "
            f"{folder} to start afresh (tasks that are still queued in it are lost)",
            code="data_moved",
        )


def handshake(url: str, *, seconds: float = 5.0) -> str | None:
    """Why an AMQP connection to `url` does not open within `seconds`; None if it does."""
    parameters = pika.URLParameters(url)
    parameters.socket_timeout = seconds
    parameters.stack_timeout = seconds
    parameters.blocked_connection_timeout = seconds
    try:
        pika.BlockingConnection(parameters).close()
    except pika.exceptions.ProbableAuthenticationError:
        return "the broker refuses the user or the password"
    except pika.exceptions.ProbableAccessDeniedError:
        return "the broker refuses the virtual host"
    except AMQPConnectorException:
        return f"the broker accepts a connection, and does not answer within {seconds:g} s"
    except (pika.exceptions.AMQPError, OSError) as error:
        return f"AMQP: {error!r}"
    return None


def find_server() -> Path:
    """RabbitMQ's own start script, not the distribution's wrapper, which requires another user."""
    folders = [
        Path("/usr/lib/rabbitmq/bin"),
        *sorted(Path("/usr/lib/rabbitmq/lib").glob("*/sbin"), reverse=True),
    ]
    folders += [Path("/opt/homebrew/opt/rabbitmq/sbin"), Path("/usr/local/opt/rabbitmq/sbin")]
    folders += [Path("/opt/rabbitmq/sbin")]
    if home := os.environ.get("RABBITMQ_HOME"):
        folders.insert(0, Path(home) / "sbin")
    found = find_program("rabbitmq-server", folders)
    # Folders like /usr/sbin hold only wrappers, which need root or the user rabbitmq.
    if found is None or found.parent in {Path("/usr/sbin"), Path("/sbin")}:
        raise InstallationError(
            "rabbitmq-server is not installed (looked in /usr/lib/rabbitmq, $RABBITMQ_HOME and PATH); install"
            " it with: sudo apt-get install -y --no-install-recommends rabbitmq-server; or use a broker that"
            " runs elsewhere: export INFERQ_AMQP_URL=amqp://user:password@host/",
            code="rabbitmq_missing",
        )
    return found


def find_epmd() -> Path:
    """Erlang's port mapper, which some packages of Erlang install outside PATH."""
    folders = [
        folder
        for root in ("/usr/lib/erlang", "/usr/local/lib/erlang")
        for folder in (Path(root) / "bin", *sorted(Path(root).glob("erts-*/bin"), reverse=True))
    ]
    found = find_program("epmd", folders)
    if found is None:
        raise InstallationError(
            "epmd, a part of Erlang, is not installed; install it with: "
            "sudo apt-get install -y --no-install-recommends erlang-base",
            code="erlang_missing",
        )
    return found
