"""The engine that fails on demand. It records each start in the task's marker file."""

from __future__ import annotations

import os
import signal
import struct
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from faulty import FaultyTask
from inferq.consumers.engine import Context, Engine
from inferq.consumers.weights.cache import use_weights
from inferq.schemas import EngineInfo, InstallationError, InvalidTask, TransientFailure


class OutOfMemoryError(RuntimeError):
    """Has the name of torch's exception."""


class FaultyEngine(Engine[FaultyTask]):
    def __init__(self) -> None:
        self._kept: list[bytes] = []

    def load(self) -> EngineInfo:
        self.batch_size = int(os.environ.get("FAULTY_BATCH_SIZE", "1"))
        switch = os.environ.get("FAULTY_LOAD")
        if switch and Path(switch).is_file():
            match Path(switch).read_text().strip():
                case "installation":
                    raise InstallationError("faulty is not installed right; install it")
                case "error":
                    raise RuntimeError("cannot load")
                case "die":
                    os._exit(3)
                case "illegible":
                    raise InstallationError("there is no model in /models/caf\udce9")
                case "fork_and_die":
                    _forked()
                    os._exit(3)
                case "no_room":
                    if _processes() > 1:
                        raise OutOfMemoryError("CUDA out of memory")
                case "slow":
                    time.sleep(3600)
        time.sleep(float(os.environ.get("FAULTY_LOAD_SECONDS", "0")))
        if name := os.environ.get("FAULTY_WEIGHTS"):
            self._weights = use_weights(name)
            return EngineInfo(name="faulty", version="1", model=self._weights.version, device="cpu")
        version = Path(switch).read_text().strip() if switch and Path(switch).is_file() else "1"
        return EngineInfo(name="faulty", version=version, model="none", device="cpu")

    def warm_up(self) -> None:
        if noted := os.environ.get("FAULTY_WARM_UPS"):
            with Path(noted).open("a") as file:
                file.write("warm-up\n")
        gate = os.environ.get("FAULTY_WARM_UP_GATE")
        while gate and not Path(gate).exists():
            time.sleep(0.02)

    def run(self, task: FaultyTask, context: Context) -> Mapping[str, Any]:
        starts = 1
        if task.options.marker:
            marker = Path(task.options.marker)
            with marker.open("a") as file:
                file.write("start\n")
            starts = len(marker.read_text().splitlines())
        print("engines print things")  # noqa: T201 - as frameworks do
        if task.options.helpers:
            program = [sys.executable, "-c", "import time; time.sleep(3600)"]
            pids = (_forked(), os.posix_spawn(sys.executable, program, os.environ))
            Path(task.options.helpers).write_text(" ".join(map(str, pids)))
        if task.options.daemon:
            _leave_daemon(Path(task.options.daemon))
        fault = task.fault if starts <= task.options.times else "none"
        match fault:
            case "crash":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "exit":
                sys.exit(4)
            case "kill_worker":
                os.kill(os.getppid(), signal.SIGKILL)
                time.sleep(3600)
            case "hang":
                while True:
                    context.check_abort()
                    time.sleep(0.02)
            case "cut_and_die":
                _forked()
                os.write(int(sys.argv[2]), struct.pack(">I", 1000) + b'{"kind":')
                os.kill(os.getpid(), signal.SIGKILL)
            case "cut_and_stay":
                os.write(int(sys.argv[2]), struct.pack(">I", 1000) + b'{"kind":')
                time.sleep(3600)
            case "endless_message":
                os.write(int(sys.argv[2]), struct.pack(">I", 2**32 - 1))
                while True:
                    os.write(int(sys.argv[2]), b"a" * 65536)
            case "hang_hard":
                time.sleep(3600)
            case "invalid":
                raise InvalidTask("this will never do", code="never")
            case "illegible":
                context.progress(0.5, "reads caf\udce9")
                raise InvalidTask("caf\udce9 is no word", code="illegible")
            case "transient":
                raise TransientFailure("not this time", code="not_now")
            case "stumble":
                context.progress(0.5, "half")
                raise TransientFailure("not this time", code="not_now")
            case "error":
                raise RuntimeError("a bug")
            case "memory":
                raise MemoryError
            case "gpu_memory":
                raise OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
            case "swell":
                swollen = []
                for _ in range(task.options.megabytes // 10):
                    swollen.append(b"\1" * (10 * 2**20))
                    time.sleep(0.02)
            case "grow":
                self._kept.append(b"\1" * (task.options.megabytes * 2**20))
            case "artifact":
                context.artifact("note.txt", "text/plain").write_text("a note")
            case "missing_artifact":
                context.artifact("note.txt", "text/plain")
            case "progress":
                for step in range(20):
                    context.progress(step / 20, f"step {step}")
                    time.sleep(0.1)
            case "gate":
                while not Path(str(task.options.gate)).exists():
                    context.check_abort()
                    time.sleep(0.02)
            case "noise":
                while True:
                    context.progress(0.5, "busy")
                    time.sleep(0.01)
            case "big":
                return {"value": "x" * 2_000_000}
            case "bad_output":
                return {"wrong": 1}
        value = context.inputs["file_url"].path.read_text() if context.inputs else "fine"
        return {"value": value}

    def batch_key(self, task: FaultyTask) -> str | None:
        return task.options.key

    def run_batch(
        self, tasks: Sequence[FaultyTask], contexts: Sequence[Context]
    ) -> list[Mapping[str, Any] | Exception]:
        for task in tasks:
            if task.fault == "batch_error":
                raise RuntimeError("a bug")
            if task.fault == "batch_memory" and len(tasks) > task.options.fits:
                raise OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return [self._output_or_error(task, context) for task, context in zip(tasks, contexts, strict=True)]

    def _output_or_error(self, task: FaultyTask, context: Context) -> Mapping[str, Any] | Exception:
        try:
            return self.run(task, context)
        except Exception as error:
            return error


def _forked() -> int:
    """Fork a process that keeps the engine's files and pipes open. Gives its pid."""
    pid = os.fork()
    if not pid:
        time.sleep(3600)
        os._exit(0)
    return pid


def _leave_daemon(noted: Path) -> None:
    if not os.fork():
        os.setsid()
        if not os.fork():
            noted.write_text(str(os.getpid()))
            time.sleep(3600)
        os._exit(0)
    os.wait()
    while not (noted.exists() and noted.read_text()):
        time.sleep(0.02)


def _processes() -> int:
    """The current number of the worker's engine processes."""
    tasks = Path(f"/proc/{os.getppid()}/task").glob("*/children")
    return sum(len(file.read_text().split()) for file in tasks)
