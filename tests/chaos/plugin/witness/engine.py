"""The engine that writes each run into the ledger; `WITNESS_LEDGER` is its file.

Its lines are those of `tests.chaos.ledger`, which is not imported: an engine sees only the protocol.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import redis

from inferq.consumers.engine import Context, Engine, TaskAborted
from inferq.schemas import EngineInfo, InvalidTask, TransientFailure
from witness import WitnessOutput, WitnessTask


class WitnessEngine(Engine[WitnessTask]):
    def load(self) -> EngineInfo:
        self.batch_size = int(os.environ.get("WITNESS_BATCH_SIZE", "1"))
        self._ledger = Path(os.environ["WITNESS_LEDGER"])
        self._descriptor = os.open(self._ledger, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        return EngineInfo(name="witness", version="1", model="none", device="cpu")

    def run_batch(
        self, tasks: Sequence[WitnessTask], contexts: Sequence[Context]
    ) -> list[WitnessOutput | Exception]:
        """Compute tasks side by side: all take as long as the longest. One that crashes ends the whole batch."""
        runs = [secrets.token_hex(6) for _ in tasks]
        for task, run in zip(tasks, runs, strict=True):
            self._note("start", task.task_id, run, str(os.getppid()))
        end = time.monotonic() + max(task.seconds for task in tasks)
        while (left := end - time.monotonic()) > 0:
            if all(context.should_abort() for context in contexts):
                raise TaskAborted
            time.sleep(min(left, 0.05))
        outputs: list[WitnessOutput | Exception] = []
        for task, run in zip(tasks, runs, strict=True):
            try:
                if task.fault != "none" and self._starts(task.task_id) <= task.options.times:
                    self._fail(task, run)
                outputs.append(WitnessOutput(run=run))
            except (InvalidTask, TransientFailure) as error:
                outputs.append(error)
        return outputs

    def run(self, task: WitnessTask, context: Context) -> WitnessOutput:
        run = secrets.token_hex(6)
        self._note("start", task.task_id, run, str(os.getppid()))
        if task.helpers:
            self._start_helpers(task.task_id, run)
        end = time.monotonic() + task.seconds
        while (left := end - time.monotonic()) > 0:
            context.check_abort()
            time.sleep(min(left, 0.05))
        if task.fault != "none" and self._starts(task.task_id) <= task.options.times:
            self._fail(task, run)
        return WitnessOutput(run=run)

    def close(self) -> None:
        os.close(self._descriptor)

    def _fail(self, task: WitnessTask, run: str) -> None:
        self._note("fault", task.task_id, run, f"the task's own: {task.fault}")
        match task.fault:
            case "transient":
                raise TransientFailure("not this time", code="not_now")
            case "invalid":
                raise InvalidTask("this will never do", code="never")
            case "crash":
                os.kill(os.getpid(), signal.SIGKILL)
            case "container":
                # Nobody but the broker shall remember that this run began.
                with redis.Redis.from_url(os.environ["INFERQ_REDIS_URL"]) as index:
                    index.flushall()
                # The worker goes first, so that it cannot count this as the death of an engine.
                os.kill(os.getppid(), signal.SIGKILL)
                time.sleep(60)

    def _start_helpers(self, task_id: str, run: str) -> None:
        """Start a program in the engine's process group, and a daemon in a session of its own."""
        with subprocess.Popen(
            ["sh", "-c", "sleep 600 > /dev/null 2>&1 & echo $!; setsid sleep 600 > /dev/null 2>&1 & echo $!"],
            stdout=subprocess.PIPE,
            text=True,
        ) as shell:
            pids = shell.communicate()[0].split()
        for pid in pids:
            self._note("helper", task_id, run, pid, content=str(os.getpid()))

    def _starts(self, task_id: str) -> int:
        """How many runs of this task have begun, by the ledger."""
        needle = json.dumps({"kind": "start", "task": task_id})[1:-1]
        return self._ledger.read_text("utf-8").count(needle)

    def _note(self, kind: str, task: str, run: str, what: str, content: str = "") -> None:
        # One write to a file opened for appending: lines of several processes never mix.
        entry = {"kind": kind, "task": task, "at": time.time(), "run": run, "what": what, "content": content}
        os.write(self._descriptor, json.dumps(entry).encode() + b"\n")
