"""FaceFusion, installed in a folder and an environment of its own: loaded once, for one task after another.

`driver` runs in FaceFusion's own Python. FaceFusion's exits, and its exceptions, end it: that fails the task in hand,
and another driver is started for the next one.
"""

from __future__ import annotations

import json
import logging
import os
import select
import shutil
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from inferq.consumers.facefusion import FaceChoice, driver, group_runner
from inferq.consumers.facefusion.backend import Swap
from inferq.consumers.facefusion.headless import (
    KEPT_LINES,
    LOOK_SECONDS,
    LineSplitter,
    base_arguments,
    checked_home,
    end_process,
    environment,
    find_python,
    judge,
    last_words,
    picture_arguments,
    read_progress,
    swapped_picture,
    write_pictures,
    wrote_output,
)
from inferq.consumers.facefusion.precision import SWAPPERS
from inferq.consumers.media.pictures import RgbImage
from inferq.engine import Context, TaskAborted
from inferq.schemas import (
    EngineInfo,
    InferqError,
    InstallationError,
    InvalidTask,
    TransientFailure,
    expand_home,
)

_STOP_SECONDS = 0.5
"""Seconds that FaceFusion gets to end a swap that has to stop; then its process is killed."""
_EXIT_SECONDS = 5.0
_LOAD_SECONDS = 300.0
"""A process that loads for longer is replaced when a task that waits for it has to stop."""
_REFUSED = 3
"""The error code of FaceFusion's workflow if its content filter refuses the target."""

_log = logging.getLogger(__name__)


class ResidentBackend:
    """Sends tasks to a FaceFusion that stays loaded. Its content filter stays on."""

    preview = False

    def __init__(
        self,
        *,
        home: Path | None,
        python: str | None,
        providers: Sequence[str],
        models: Path | None = None,
        swapper: str | None = None,
    ) -> None:
        """Starts FaceFusion in `home` with `python`, and loads its models.

        `providers` are its execution providers. `models` is a folder with all weights; by default FaceFusion uses
        its own, and downloads those that are missing. `swapper` is its face swapper, by default that of its
        own configuration. Raises InstallationError if it cannot run here, and TransientFailure if another start may
        work.
        """
        self._home = checked_home(home)
        self._models = models and expand_home("INFERQ_FACEFUSION_MODEL_DIR", models).absolute()
        # With `tolerant`, FaceFusion keeps its models from one picture to the next.
        self._arguments = [*base_arguments(providers, swapper), "--video-memory-strategy", "tolerant"]
        self._command = [find_python(self._home, python), str(driver.__file__)]
        self._process: _DriverProcess | None = self._start()
        try:
            version = self._wait_loaded(lambda: None)
        except BaseException:
            self.close()
            raise
        self.info = EngineInfo(
            name="facefusion",
            version=version,
            model=swapper or "face_swapper",
            device=",".join(providers),
            precision=SWAPPERS[swapper] if swapper is not None else None,
        )

    def warm_up(self) -> None:
        """Run each model once."""
        answer = self._driver.ask({"warm_up": True}, lambda: None)
        if answer is None:
            raise self._ended()

    def close(self) -> None:
        """End FaceFusion with all that it started."""
        if self._process is not None:
            self._process.end()
            self._process = None

    def swap(self, source: RgbImage, target: RgbImage, face: FaceChoice, context: Context) -> Swap:
        """The target with the selected faces replaced. FaceFusion does not report which ones it found."""
        folder = context.scratch / "facefusion"
        folder.mkdir()
        try:
            write_pictures(folder, source, target)
            self._ensure_loaded(context)
            context.progress(0.15, "checking the pictures")
            answer = self._ask({"swap": [*self._arguments, *picture_arguments(folder, face)]}, context)
            failure = self._judge(answer, wrote_output(folder))
            if failure is not None:
                raise failure
            return Swap(swapped_picture(folder, target))
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _ask(self, request: Mapping[str, object], context: Context) -> Mapping[str, object] | None:
        """The driver's answer, None if it ended. Reports progress. Raises TaskAborted if the run has to stop."""

        def said(line: str) -> None:
            if (progress := read_progress(line)) is not None:
                context.progress(*progress)

        try:
            return self._driver.ask(request, context.check_abort, said)
        except TaskAborted:
            if not self._driver.stop():
                self._replace()
            raise

    def _judge(self, answer: Mapping[str, object] | None, output: bool) -> InferqError | None:
        """The error to raise for an answer to a swap; None for success. Replaces a driver that has ended."""
        if answer is not None and "ended" in answer:
            return judge_workflow(int(str(answer["ended"])), output, tuple(self._driver.lines))
        failure = self._ended() if answer is None else self._unready(str(answer["unready"]))
        self._replace()
        return TransientFailure(failure.message, code=failure.code)

    @property
    def _driver(self) -> _DriverProcess:
        if self._process is None:
            self._process = self._start()
        return self._process

    def _start(self) -> _DriverProcess:
        process = _DriverProcess(self._command, [str(self._models)] if self._models else [], self._home)
        process.send({"load": self._arguments})
        return process

    def _replace(self) -> None:
        """Start another driver. It loads while the worker ends the task."""
        self.close()
        with suppress(OSError):  # the next task tries again
            self._process = self._start()

    def _ensure_loaded(self, context: Context) -> None:
        """Wait until the models are loaded. A driver that ended between two tasks is replaced."""
        if self._driver.loaded and not self._driver.alive:
            _log.warning("FaceFusion ended between two tasks: %s", self._ended().message)
            self._replace()
        if self._driver.loaded:
            return
        context.progress(0.05, "loading the models")
        try:
            self._wait_loaded(context.check_abort)
        except TaskAborted:
            if self._driver.age > _LOAD_SECONDS:  # else it goes on loading for the next task
                self._replace()
            raise
        except InferqError as error:
            self._replace()
            raise TransientFailure(error.message, code=error.code) from error

    def _wait_loaded(self, check: Callable[[], None]) -> str:
        """Wait for the models, and give FaceFusion's version."""
        answer = self._driver.answer(check)
        if answer is None:
            failure = self._ended()
            if failure.code in {"out_of_memory", "engine_died"}:
                raise failure
            raise InstallationError(
                f"FaceFusion in {self._home} does not start under {self._command[0]}: {failure.message}. Install "
                "it with its install.py, set INFERQ_FACEFUSION_PYTHON to the Python (3.12 or later) of its "
                "environment, or use INFERQ_FACEFUSION_RESIDENT=false",
                code="engine_not_loadable" if failure.code == "engine_error" else failure.code,
            )
        if "unready" in answer:
            raise self._unready(str(answer["unready"]))
        self._driver.loaded = True
        return str(answer["ready"])

    def _ended(self) -> TransientFailure:
        """The error for a driver that ended without an answer."""
        failure = judge(self._driver.exit_status(), False, tuple(self._driver.lines))
        if isinstance(failure, TransientFailure):
            return failure
        return TransientFailure(f"FaceFusion ended: {failure}", code="engine_error")

    def _unready(self, reason: str) -> InstallationError | TransientFailure:
        """The error for a driver that refuses to load."""
        said = f"its output: {last_words(tuple(self._driver.lines))}"
        match reason:
            case "content filter":
                return InstallationError(
                    f"the content filter of FaceFusion in {self._home} was changed: restore "
                    f"facefusion/content_analyser.py; {said}",
                    code="engine_misconfigured",
                )
            case "weights" if self._models is None:
                return TransientFailure(
                    f"weights of FaceFusion in {self._home} are missing or damaged, and cannot be downloaded: run "
                    f"`python facefusion.py force-download` there; {said}",
                    code="weights_unavailable",
                )
            case "weights":
                return InstallationError(
                    f"weights of FaceFusion in {self._models} are missing, or do not match their .hash files; {said}",
                    code="engine_misconfigured",
                )
            case "dependencies":
                return InstallationError(
                    f"FaceFusion needs curl and ffmpeg: install them; {said}", code="engine_not_loadable"
                )
        return InstallationError(
            f"a value in {self._home}/facefusion.ini is wrong; {said}", code="engine_misconfigured"
        )


def judge_workflow(error: int, has_output: bool, lines: Sequence[str]) -> InferqError | None:
    """The error to raise for this error code of FaceFusion's workflow and these output lines; None for success."""
    if error == _REFUSED:
        return InvalidTask(
            "target_url: FaceFusion's content filter refused the target; send another picture",
            code="content_refused",
        )
    failure = judge(0 if error == 0 else 1, has_output, lines)
    if error == 0 or failure is None or failure.code not in {"engine_error", "content_refused"}:
        return failure
    return TransientFailure(
        f"FaceFusion's workflow ended with the error code {error}; its output: {last_words(lines)}",
        code="engine_error",
    )


class _DriverProcess:
    """A running driver. Requests and answers are on a socket, all that it prints is on a pipe."""

    def __init__(self, command: Sequence[str], models: Sequence[str], home: Path) -> None:
        self.loaded = False
        self._began = time.monotonic()
        self.lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._splitter = LineSplitter()
        self._received = b""
        self._socket, far = socket.socketpair()
        with far:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-I", str(group_runner.__file__)),
                    *(*command, str(far.fileno()), *models),
                ],
                cwd=home,
                env=environment(),
                pass_fds=[far.fileno()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                process_group=0,  # the runner outlives the engine's group, to kill FaceFusion's
            )
        if self._process.stdout is None:
            raise RuntimeError("the process was started without a pipe")
        self._output = self._process.stdout.fileno()
        os.set_blocking(self._output, False)
        self._poller = select.poll()
        for descriptor in (self._socket.fileno(), self._output):
            self._poller.register(descriptor, select.POLLIN)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def age(self) -> float:
        """Seconds since its start."""
        return time.monotonic() - self._began

    def send(self, request: Mapping[str, object]) -> None:
        """Send a request. If the driver has ended, `answer` says so."""
        with suppress(OSError):
            self._socket.sendall(json.dumps(request).encode() + b"\n")

    def ask(
        self,
        request: Mapping[str, object],
        check: Callable[[], None],
        said: Callable[[str], None] = lambda _line: None,
    ) -> Mapping[str, object] | None:
        """The answer to a request. `lines` are then the last lines that it printed meanwhile."""
        self._read_output(lambda _line: None)
        self.lines.clear()
        self.send(request)
        return self.answer(check, said)

    def answer(
        self, check: Callable[[], None], said: Callable[[str], None] = lambda _line: None
    ) -> Mapping[str, object] | None:
        """Wait for an answer; None if the driver ended. `check` is called often, `said` gets each printed line."""
        while b"\n" not in self._received:
            check()
            ready = {descriptor for descriptor, _ in self._poller.poll(LOOK_SECONDS * 1000)}
            if self._output in ready:
                self._read_output(said)
            if self._socket.fileno() in ready:
                data = b""
                with suppress(ConnectionResetError):
                    data = self._socket.recv(65536)
                if not data:
                    self.exit_status()
                    self._read_output(said)
                    return None
                self._received += data
        self._read_output(said)
        line, _, self._received = self._received.partition(b"\n")
        answer: Mapping[str, object] = json.loads(line)
        return answer

    def stop(self) -> bool:
        """Have it end the swap in hand. Gives whether it does so soon; else it must be killed."""
        deadline = time.monotonic() + _STOP_SECONDS

        def check() -> None:
            if time.monotonic() > deadline:
                raise TimeoutError

        self.send({"stop": True})
        try:
            return self.answer(check) is not None
        except TimeoutError:
            return False

    def exit_status(self) -> int:
        """Its exit status, or 128 plus the number of the signal that killed it."""
        try:
            status = self._process.wait(_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        return status if status >= 0 else 128 - status

    def end(self) -> None:
        """Kill it with all that it started."""
        self._socket.close()
        end_process(self._process)

    def _read_output(self, said: Callable[[str], None]) -> None:
        """Log what it has printed so far, and pass it on."""
        with suppress(BlockingIOError):
            while True:
                data = os.read(self._output, 65536)
                for line in self._splitter.feed(data):
                    self.lines.append(line)
                    said(line)
                    if "%|" not in line:  # a progress bar
                        _log.info("FaceFusion: %s", line)
                if not data:
                    with suppress(KeyError):
                        self._poller.unregister(self._output)
                    return
