"""The data folder of `inferq up`: who holds it, the chosen ports, and the variables for other shells."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shlex
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from inferq.producer.up.orphan_reaper import alive
from inferq.producer.up.part import free_ports, port_free, private_text
from inferq.schemas import InferqError, InstallationError


class DataFolder:
    """A data folder; at most one supervisor holds it at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self._lock: int | None = None

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def env_file(self) -> Path:
        return self.path / "env"

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Turn an OSError in the block into InstallationError (`bad_data_folder`)."""
        try:
            yield
        except OSError as error:
            raise InstallationError(
                f"the data folder {self.path} cannot be used: {error.strerror}; choose another with --data",
                code="bad_data_folder",
            ) from error

    def hold(self) -> int:
        """Hold the folder until `release`, or until this process and all that inherit the descriptor have ended.

        Gives the descriptor. Raises InferqError (`already_up`), naming the pid, if another process holds it, and
        InstallationError (`bad_data_folder`) if it cannot be written.
        """
        with self.in_use():
            self.path.mkdir(parents=True, exist_ok=True)
            self.path.chmod(0o700)
            descriptor = os.open(self._lock_file, os.O_RDWR | os.O_CREAT, 0o600)
        if not self._acquire(descriptor):
            os.close(descriptor)
            raise InferqError(
                f"inferq is already up on {self.path} (pid {self.holder()}); "
                f"stop it with: inferq down --data {shlex.quote(str(self.path))}",
                code="already_up",
            )
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        self._lock = descriptor
        return descriptor

    def _acquire(self, descriptor: int) -> bool:
        # After a supervisor was killed, its orphan reaper keeps the lock until everything has ended.
        end = time.monotonic() + 20
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
                holder = self.holder()
                if (holder is not None and alive(holder)) or time.monotonic() > end:
                    return False
                time.sleep(0.05)
            else:
                return True

    def release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def held(self) -> bool:
        """Whether a supervisor, or its orphan reaper, holds the folder now."""
        try:
            descriptor = os.open(self._lock_file, os.O_RDWR)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return True
            raise
        else:
            return False
        finally:
            os.close(descriptor)

    def holder(self) -> int | None:
        """The pid of the supervisor that held the folder last."""
        try:
            return int(self._lock_file.read_text())
        except (OSError, ValueError):
            return None

    @property
    def _lock_file(self) -> Path:
        return self.path / "up.lock"

    def ports(self, names: list[str]) -> dict[str, int]:
        """A port for each name: the earlier one, unless another program has taken it since."""
        file = self.path / "ports.json"
        try:
            kept = json.loads(file.read_text())
        except (OSError, ValueError):
            kept = {}
        if not isinstance(kept, dict):
            kept = {}
        chosen = {name: port for name in names if isinstance(port := kept.get(name), int) and port_free(port)}
        missing = [name for name in names if name not in chosen]
        # Parts that do not start this time keep their ports.
        taken = {port for port in kept.values() if isinstance(port, int)}
        chosen |= dict(zip(missing, free_ports(len(missing), besides=taken), strict=True))
        private_text(file, json.dumps(kept | chosen, indent=2) + "\n")
        return chosen

    def kept_env(self) -> dict[str, str]:
        """The variables that were last written to `env`."""
        try:
            words = shlex.split(self.env_file.read_text(encoding="utf-8"), comments=True)
        except (OSError, ValueError):
            return {}
        return dict(word.split("=", 1) for word in words if "=" in word)

    def write_env(self, variables: Mapping[str, str]) -> None:
        """Write `env` for other shells to source. It holds secrets, so only its owner may read it."""
        lines = [f"export {name}={shlex.quote(value)}\n" for name, value in variables.items()]
        private_text(self.env_file, "".join(lines))
