"""The plan of `inferq up`: the parts, their ports, and the variables by which they find each other."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from inferq.broker import BrokerSettings, BrokerUnavailable, connect
from inferq.producer.gateway.keys import KeyFile
from inferq.producer.up.folder import DataFolder
from inferq.producer.up.part import LOOPBACK, Part, port_free
from inferq.producer.up.rabbitmq import RabbitNode, RabbitPorts
from inferq.producer.up.redis import RedisServer, ping
from inferq.schemas import InferqError, installed_types
from inferq.schemas.logs import LogSettings
from inferq.storage import StatusIndex, StorageSettings, WebhookSecrets, open_store

_RABBIT_PORTS = ("amqp", "management", "prometheus", "distribution", "epmd")
_JOB_PARTS = ("callbacks", "batches")
"""Each is a process of its own, so that feeding a batch never delays a callback."""
_WORKER = "worker-"
_KEYS = "api-keys.json"
TENANT = "default"
_ANSWER_BYTES = 10_000
"""The most that is read of an answer to a probe."""


@dataclass(frozen=True)
class Plan:
    """Everything that runs. `variables` are the INFERQ_* ones; `facts` are for people, label → text."""

    parts: tuple[Part, ...]
    variables: Mapping[str, str]
    facts: Mapping[str, str]

    def without(self, left_out: Sequence[str], *, late: Sequence[str] = ()) -> Plan:
        """The plan without the parts that were left out. Its facts name these, and those that are not ready yet."""
        if not left_out and not late:
            return self
        parts = tuple(part for part in self.parts if part.name not in left_out)
        ready = [part.name for part in parts if part.name.startswith(_WORKER) and part.name not in late]
        workers_text = _types(ready)
        if late:
            workers_text += f"; not ready yet, still retrying: {_types(late)}"
        if left_out:
            workers_text += f"; left out: {_types(left_out)}"
        return replace(self, parts=parts, facts={**self.facts, "workers": workers_text})


def _types(workers: Sequence[str]) -> str:
    return ", ".join(name.removeprefix(_WORKER) for name in workers)


def choose_types(names: str | None) -> tuple[str, ...]:
    """The task types in a comma-separated list, or all that are installed.

    Raises InferqError (`unknown_task_type`) for a name that is not installed.
    """
    installed = tuple(installed_types())
    if names is None:
        return installed
    chosen = tuple(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    unknown = [name for name in chosen if name not in installed]
    if unknown or not chosen:
        raise InferqError(
            f"--types {names!r} names {', '.join(unknown) or 'no type'}; "
            f"installed are: {', '.join(installed) or 'none'}",
            code="unknown_task_type",
        )
    return chosen


def make_plan(
    folder: DataFolder,
    *,
    port: int,
    types: Sequence[str],
    required: bool = True,
    max_loaded: int | None = None,
) -> Plan:
    """Prepare `folder` (which the caller holds) for the gateway on `port` and a worker for each type.

    Unless all workers are `required`, they are optional parts. With `max_loaded`, one worker serves all types, and so
    many of its engines are loaded at a time.
    A `port` of 0 takes a free one and keeps it. If the environment names a broker, a Redis or an object store, that
    one is used instead of a private one. Raises InferqError (`port_taken`, `not_answering`) and InstallationError.
    """
    schedules = _schedules(folder)
    served = types if max_loaded is None else [",".join(types)]
    probed = (*served, *_JOB_PARTS, "monitor", *(["beat"] if schedules else []))
    names = [*_RABBIT_PORTS, "redis", *(f"probe-{name}" for name in probed)]
    if port == 0:
        names.append("gateway")
    elif not port_free(port):
        raise InferqError(
            f"port {port} is taken by another program; choose another with --port (0 takes a free one)",
            code="port_taken",
        )
    ports = folder.ports(names)
    port = port or ports["gateway"]

    parts: list[Part] = []
    facts = {"gateway": f"http://{LOOPBACK}:{port}", "workers": ", ".join(types)}

    amqp_url = _from_environment("INFERQ_AMQP_URL", folder.path / "rabbitmq" / "password")
    if amqp_url is None:
        node = RabbitNode.prepare(
            folder.path / "rabbitmq", RabbitPorts(*(ports[name] for name in _RABBIT_PORTS))
        )
        parts += node.parts()
        amqp_url = node.url
        facts["rabbitmq"] = f"{LOOPBACK}:{node.ports.amqp}, management at {node.management_url}"
    else:
        _must_answer("INFERQ_AMQP_URL", _broker_refusal(BrokerSettings.load()))
        facts["rabbitmq"] = "the one that INFERQ_AMQP_URL names"

    redis_url = _from_environment("INFERQ_REDIS_URL", folder.path / "redis" / "password")
    if redis_url is None:
        server = RedisServer.prepare(folder.path / "redis", ports["redis"])
        parts.append(server.part())
        redis_url = server.url
        facts["redis"] = f"{LOOPBACK}:{server.port}"
    else:
        index = StatusIndex.from_settings(StorageSettings.load())  # the same
        _must_answer("INFERQ_REDIS_URL", ping(redis_url))
        index.require_supported()
        facts["redis"] = "the one that INFERQ_REDIS_URL names"

    own_store = (folder.path / "store").as_uri()
    store_url = os.environ.get("INFERQ_STORE_URL", "").strip() or own_store
    if store_url == own_store:
        (folder.path / "store").mkdir(exist_ok=True)
    else:
        open_store(StorageSettings.load())  # raises, naming the setting, if it cannot be read
        facts["store"] = "the one that INFERQ_STORE_URL names"

    services = tuple(part.name for part in parts)
    variables = {
        "INFERQ_AMQP_URL": amqp_url,
        "INFERQ_REDIS_URL": redis_url,
        "INFERQ_STORE_URL": store_url,
        "INFERQ_API_URL": f"http://{LOOPBACK}:{port}",
        "INFERQ_API_KEY": _api_key(folder),
        "INFERQ_API_KEYS_FILE": str(folder.path / _KEYS),
        "INFERQ_WEBHOOK_SECRETS_FILE": str(_webhook_secrets(folder)),
    }
    if schedules is not None:
        variables["INFERQ_SCHEDULES_FILE"] = str(schedules)
        facts["schedules"] = str(schedules)
    folder.write_env(variables)
    facts["data"] = f"{folder.path}, logs in {folder.logs}"
    facts["other shells"] = f". {shlex.quote(_shortest(folder.env_file))}"

    # The parts write to files, and this process may have a terminal.
    env = os.environ | {"INFERQ_LOG_FORMAT": LogSettings.load().form} | variables
    parts.append(_gateway(port, env, services))
    limit = {} if max_loaded is None else {"INFERQ_MAX_LOADED": str(max_loaded)}
    workers = [_worker(name, ports[f"probe-{name}"], {**env, **limit}, services) for name in served]
    parts += [replace(worker, optional=not required) for worker in workers]
    # So that callbacks of this folder's owner reach `inferq listen` on this machine.
    env = {"INFERQ_CALLBACK_LOOPBACK_TENANTS": TENANT} | env
    parts += [_jobs(name, ports[f"probe-{name}"], env, services) for name in _JOB_PARTS]
    parts.append(_monitor(ports["probe-monitor"], env, services))
    if schedules is not None:
        parts.append(_beat(ports["probe-beat"], env, services))
    return Plan(tuple(parts), variables, facts)


def _gateway(port: int, env: Mapping[str, str], needs: tuple[str, ...]) -> Part:
    return Part(
        name="gateway",
        argv=(
            sys.executable,
            "-P",
            "-m",
            "inferq.producer.cli",
            "gateway",
            "--host",
            LOOPBACK,
            "--port",
            str(port),
        ),
        env=env,
        probe=lambda: http_ready(port),
        needs=needs,
        stop_rank=10,
        grace=15,
        start_limit=60,
    )


def _worker(types: str, port: int, env: Mapping[str, str], needs: tuple[str, ...]) -> Part:
    return Part(
        name=f"{_WORKER}{types}",
        argv=(sys.executable, "-P", "-m", "inferq.producer.cli", "worker", types),
        env={**env, "INFERQ_PROBE_HOST": LOOPBACK, "INFERQ_PROBE_PORT": str(port)},
        probe=lambda: http_ready(port),
        needs=needs,
        stop_rank=0,
        # A task in hand has the worker's own grace (INFERQ_GRACE_SECONDS, 30 s) before that.
        grace=40,
        start_limit=300,
    )


def _jobs(queue: str, port: int, env: Mapping[str, str], needs: tuple[str, ...]) -> Part:
    return Part(
        name=queue,
        argv=(sys.executable, "-P", "-m", "inferq.producer.cli", "callbacks", "--queues", queue),
        env={**env, "INFERQ_PROBE_HOST": LOOPBACK, "INFERQ_PROBE_PORT": str(port)},
        probe=lambda: http_ready(port),
        needs=needs,
        stop_rank=5,
        grace=20,
        start_limit=60,
    )


def _monitor(port: int, env: Mapping[str, str], needs: tuple[str, ...]) -> Part:
    return Part(
        name="monitor",
        argv=(sys.executable, "-P", "-m", "inferq.producer.cli", "monitor"),
        env={**env, "INFERQ_PROBE_HOST": LOOPBACK, "INFERQ_PROBE_PORT": str(port)},
        probe=lambda: http_ready(port),
        needs=needs,
        stop_rank=5,
        grace=15,
        start_limit=60,
    )


def _beat(port: int, env: Mapping[str, str], needs: tuple[str, ...]) -> Part:
    return Part(
        name="beat",
        argv=(sys.executable, "-P", "-m", "inferq.producer.cli", "beat"),
        env={**env, "INFERQ_PROBE_HOST": LOOPBACK, "INFERQ_PROBE_PORT": str(port)},
        probe=lambda: http_ready(port),
        needs=needs,
        stop_rank=10,
        grace=15,
        start_limit=60,
    )


def _schedules(folder: DataFolder) -> Path | None:
    """The file of schedules that the environment names, or the folder's own; None if there is neither.

    It is read here, so that a fault in it is reported before anything starts. Raises InferqError
    (`bad_schedules`).
    """
    ours = folder.path / "schedules.toml"
    named = os.environ.get("INFERQ_SCHEDULES_FILE")
    file = Path(named).absolute() if named else ours
    # A shell that sourced `<data>/env` names the folder's own file, which may have been deleted since.
    if file == ours and not file.exists():
        return None
    from inferq.producer.nightly import read_schedules

    read_schedules(file)
    return file


def http_ready(port: int, path: str = "/readyz") -> str | None:
    """Why the part with its probes on this loopback port takes no work yet; None if it does.

    A worker answers 200 as soon as its engine is loaded, and names the services that it waits for.
    """
    # Straight to the socket, without a proxy from the environment.
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=2)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        text = answer.read(_ANSWER_BYTES).decode("utf-8", "replace").strip()
    except (OSError, http.client.HTTPException) as error:
        return f"port {port}: {error}"
    finally:
        connection.close()
    if answer.status == 200 and not _waits(text):
        return None
    return f"{path} answers {answer.status} {text[:400]}".rstrip()


def _waits(answer: str) -> bool:
    with contextlib.suppress(ValueError, AttributeError):
        return bool(json.loads(answer).get("waiting_for"))
    return False


def _from_environment(name: str, secret: Path) -> str | None:
    """The service that the environment names, unless it is our own private one.

    A shell that sourced `<data>/env` names that folder's private services, which do not run yet.
    """
    url = os.environ.get(name) or None
    if url is None:
        return None
    try:
        ours = secret.read_text(encoding="utf-8").strip()
    except OSError:
        return url
    return None if ours and ours in url else url


def _broker_refusal(settings: BrokerSettings) -> str | None:
    """Why no part could connect to this broker; None if one can. Raises InstallationError for a bad setting."""
    try:
        connect(settings, name="up").close()
    except BrokerUnavailable as error:
        return str(error)
    return None


def _must_answer(name: str, reason: str | None) -> None:
    if reason is not None:
        raise InferqError(
            f"what {name} names does not answer ({reason}); start it, correct {name}, or unset it for a "
            "private one",
            code="not_answering",
        )


def _api_key(folder: DataFolder) -> str:
    keys = KeyFile(folder.path / _KEYS)
    kept = folder.kept_env().get("INFERQ_API_KEY", "")
    if kept and keys.tenant_of(kept) is not None:
        return kept
    return keys.add(TENANT, name="inferq up")


def _webhook_secrets(folder: DataFolder) -> Path:
    file = folder.path / "webhook-secrets.json"
    secrets = WebhookSecrets(file)
    if not secrets.of(TENANT):
        secrets.rotate(TENANT)
    return file


def _shortest(path: Path) -> str:
    relative = os.path.relpath(path)
    return relative if len(relative) < len(str(path)) else str(path)
