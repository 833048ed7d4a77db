"""A part of `inferq up`: an ordinary process, how to check it, and how to stop it."""

from __future__ import annotations

import atexit
import os
import random
import secrets
import shutil
import signal
import socket
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from inferq.schemas import InstallationError

LOOPBACK = "127.0.0.1"

_random = random.SystemRandom()


@dataclass(frozen=True)
class Part:
    """One process of a running inferq.

    `env` is its whole environment. `probe` checks once, within a second or two, whether it works, and gives
    the reason if it does not, or None. `needs` names the parts that must be ready before it starts. Parts are
    stopped by ascending `stop_rank`, those of one rank together. `grace` and `start_limit` are in seconds.
    A `gentle` part is asked to stop even if its supervisor was killed; all others are killed with it. The others do
    not wait for an `optional` part that does not become ready at first. It is not started again if it ends with
    EXIT_CONFIG.
    """

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    probe: Callable[[], str | None]
    needs: tuple[str, ...] = ()
    stop_rank: int = 0
    stop_signal: signal.Signals = signal.SIGTERM
    grace: float = 15.0
    start_limit: float = 60.0
    folder: Path | None = None
    gentle: bool = False
    optional: bool = False


def port_free(port: int) -> bool:
    """Whether a server could listen on this loopback port now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


def free_ports(count: int, *, besides: Collection[int] = ()) -> list[int]:
    """So many different free loopback ports, none of `besides`.

    They lie below the kernel's range for outgoing connections (Linux: from 32768): no such connection takes a
    port while its server restarts. They stay bound until this process ends, so that other processes do not find
    them free. A server that sets SO_REUSEADDR, as servers do, can still listen there.
    """
    found: list[int] = []
    for port in _random.sample(range(15000, 32000), 4000):
        if len(found) == count:
            return found
        if port in besides:
            continue
        held = socket.socket()
        try:
            held.bind((LOOPBACK, port))  # fails if the port is bound, listening or not
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # from now on a server can listen here
        except OSError:
            held.close()
            continue
        atexit.register(held.close)
        found.append(port)
    raise InstallationError(f"no {count} free loopback ports between 15000 and 32000", code="no_free_port")


def port_answers(port: int) -> str | None:
    """Why nothing answers on this loopback port; None if something does."""
    try:
        with socket.create_connection((LOOPBACK, port), timeout=2):
            return None
    except OSError as error:
        return f"port {port}: {error.strerror or error}"


def private_text(path: Path, text: str) -> None:
    """Write a file that only its owner may read, completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    draft.replace(path)


def kept_secret(path: Path) -> str:
    """The random secret in this file (URL-safe, 192 bits), made on first use."""
    try:
        kept = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        kept = ""
    if not kept:
        kept = secrets.token_urlsafe(24)
        private_text(path, kept + "\n")
    return kept


def find_program(name: str, folders: Iterable[Path] = ()) -> Path | None:
    """The first executable of that name in these folders or on PATH."""
    for folder in folders:
        candidate = folder / name
        if candidate.is_file() and os.access(candidate, os.X_OK):
            return candidate
    found = shutil.which(name)
    return Path(found) if found else None
