"""A supervisor in a process of its own. Its starter waits until everything is ready, then leaves it running.

The two share a socket. The supervisor sends a JSON line for each event while it starts. If the starter ends before
everything is ready, the supervisor stops everything; a supervisor that is bound to its starter does so at any time.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from inferq.producer.up.folder import DataFolder
from inferq.producer.up.foreground import UpOptions, run_until_stopped
from inferq.producer.up.plan import Plan
from inferq.producer.up.supervisor import Report, Supervisor
from inferq.schemas import InferqError
from inferq.schemas.logs import LogSettings, start_log

_log = logging.getLogger(__name__)

_TROUBLE = frozenset(("ended", "failing", "late", "left out"))


def start_detached(options: UpOptions, *, report: Callable[[Report], None]) -> Mapping[str, str]:
    """Start a supervisor that outlives this process; returns once all parts are ready.

    Gives the plan's facts. Raises InferqError if the start fails; nothing runs then. If this process is
    interrupted or killed while it waits, the supervisor stops everything that it started.
    """
    channel, process = _start(options, bound=False)
    with channel:
        try:
            return _until_ready(channel, process, options, report)
        except (InferqError, KeyboardInterrupt):
            channel.close()
            process.wait()
            raise
        finally:
            # It outlives this process, so nobody here waits for its end.
            process.returncode = process.poll() or 0


@contextmanager
def while_up(options: UpOptions, *, report: Callable[[Report], None]) -> Iterator[Mapping[str, str]]:
    """Keep everything up for the length of a `with` block, or until this process ends in any way.

    Gives the INFERQ_ variables of `<data>/env`. Raises InferqError if the start fails.
    """
    channel, process = _start(options, bound=True)
    try:
        with channel:
            _until_ready(channel, process, options, report)
            yield DataFolder(options.data).kept_env()
    finally:
        try:
            process.wait()
        except KeyboardInterrupt:
            process.terminate()  # a second request stops at once
            process.wait()
            raise


def _start(options: UpOptions, *, bound: bool) -> tuple[socket.socket, subprocess.Popen[bytes]]:
    order = {
        "data": str(options.data),
        "port": options.port,
        "types": options.types,
        "required": options.required,
        "max_loaded": options.max_loaded,
        "bound": bound,
    }
    log = _log_file(options)
    env = os.environ | {"INFERQ_LOG_FORMAT": LogSettings.load().form}
    with DataFolder(options.data).in_use():
        log.parent.mkdir(parents=True, exist_ok=True)
        output = log.open("ab")
    ours, theirs = socket.socketpair()
    with theirs, output:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "inferq.producer.up", str(theirs.fileno()), json.dumps(order)],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(theirs.fileno(),),
        )
    return ours, process


def _log_file(options: UpOptions) -> Path:
    return DataFolder(options.data).logs / "up.log"


def _until_ready(
    channel: socket.socket,
    process: subprocess.Popen[bytes],
    options: UpOptions,
    report: Callable[[Report], None],
) -> Mapping[str, str]:
    facts = _follow(channel, report)
    if facts is None:
        raise InferqError(
            f"the supervisor ended (exit code {process.wait()}) before it was ready; see {_log_file(options)}",
            code="up_failed",
        )
    return facts


def _follow(channel: socket.socket, report: Callable[[Report], None]) -> Mapping[str, str] | None:
    with channel.makefile("r", encoding="utf-8") as lines:
        for line in lines:
            message = json.loads(line)
            if "ready" in message:
                ready: dict[str, str] = message["ready"]
                return ready
            if "failed" in message:
                lines.read()  # until everything has stopped
                raise InferqError(message["failed"], code=message["code"])
            report(Report(**message["report"]))
    return None


def main(arguments: list[str]) -> int:
    """The supervisor's side. The arguments are the socket's descriptor and the options as JSON."""
    channel = socket.socket(fileno=int(arguments[0]))
    os.set_inheritable(channel.fileno(), False)
    order = json.loads(arguments[1])
    options = UpOptions(
        Path(order["data"]), order["port"], tuple(order["types"]), order["required"], order["max_loaded"]
    )
    start_log("up")
    state = _Starter(channel, bound=order["bound"])
    try:
        run_until_stopped(options, report=state.report, when_ready=state.ready, watch=state.watch)
    except InferqError as error:
        _log.error("%s", error)
        state.send({"failed": error.message, "code": error.code})
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        channel.close()
    return 0


class _Starter:
    """The process that waits for the supervisor to be ready, as the supervisor sees it."""

    def __init__(self, channel: socket.socket, *, bound: bool) -> None:
        self._channel = channel
        self._bound = bound
        self._waiting = True

    def report(self, report: Report) -> None:
        level = logging.WARNING if report.stage in _TROUBLE else logging.INFO
        _log.log(level, "%s: %s", report.part, f"{report.stage} {report.text}".rstrip())
        self.send({"report": asdict(report)})

    def ready(self, plan: Plan) -> None:
        self.send({"ready": dict(plan.facts)})
        self._waiting = False

    def watch(self, loop: asyncio.AbstractEventLoop, supervisor: Supervisor) -> None:
        def gone() -> None:
            loop.remove_reader(self._channel)
            if self._waiting or self._bound:
                self._waiting = False
                supervisor.request_stop()

        loop.add_reader(self._channel, gone)

    def send(self, message: Mapping[str, object]) -> None:
        if self._waiting:
            try:
                self._channel.sendall(json.dumps(message).encode() + b"\n")
            except OSError:
                return  # `watch` notices that the starter is gone
