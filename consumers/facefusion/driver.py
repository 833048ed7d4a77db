"""Keeps FaceFusion loaded, and swaps one picture after another. FaceFusion's own Python runs this file.

    python driver.py DESCRIPTOR [MODELS]        in FaceFusion's folder

This file imports only the standard library and FaceFusion 3.8. `DESCRIPTOR` is a socket. Requests and answers on it
are JSON, one on a line. An answer comes for each request but `stop`, in order:

    {"load": ["headless-run", "--processors", …]}   {"ready": "3.8.1"}, or {"unready": reason} and the end
    {"warm_up": true}                               {"warm": true}
    {"swap": ["headless-run", "-s", …]}             {"ended": error code of FaceFusion's workflow; 0 for success}
    {"stop": true}                                  none: the swap in hand ends soon

Every exit of FaceFusion, and every exception, ends this process. Its exit status and its output then say the reason.
A process that swaps again after one of them might have a broken state or a broken GPU context.

`MODELS` is a folder with all weights. FaceFusion then uses them instead of `.assets/models`, and downloads none.
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

_MODELS = "../.assets/models"
"""FaceFusion's own folder of weights, as it names it: relative to its package."""
_STOP_SECONDS = 0.02
_ENDED_EARLY = 4
"""The error code with which FaceFusion's workflow ends if it is stopped."""


def main() -> None:
    """Serve the socket of the command line until it closes."""
    home = str(Path.cwd())
    here = str(Path(__file__).parent)
    sys.path[:] = [home, *(path for path in sys.path if path not in {here, home})]
    os.environ["OMP_NUM_THREADS"] = "1"  # as facefusion.py does
    _part("conda").setup()  # may start this process again, with other library paths
    descriptor, *models = sys.argv[1:]
    os.set_inheritable(int(descriptor), False)  # a program that FaceFusion starts would hold it open
    status = 0
    try:
        Driver(socket.socket(fileno=int(descriptor)), *models).serve()
    except SystemExit as end:
        if isinstance(end.code, str):
            sys.stderr.write(f"{end.code}\n")
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    _exit(status)


def _exit(status: int) -> None:
    """End at once: threads of FaceFusion and destructors of its libraries cannot delay it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status & 0xFF)


def _part(name: str) -> Any:
    """A module of FaceFusion."""
    return importlib.import_module(f"facefusion.{name}")


class Driver:
    """FaceFusion, loaded once."""

    def __init__(self, pipe: socket.socket, models: str | None = None) -> None:
        self._pipe = pipe
        self._models = models
        self._requests: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._swapping = threading.Event()
        self._stopped = threading.Event()
        self._program: Any = None
        self._workflow: Any = None

    def serve(self) -> None:
        """Answer requests. The process ends when the socket closes."""
        threading.Thread(target=self._receive, name="requests", daemon=True).start()
        while True:
            request = self._requests.get()
            if "load" in request:
                answer: dict[str, object] = {"ready": self._load(request["load"])}
            elif "warm_up" in request:
                answer = {"warm": self._warm_up()}
            else:
                answer = {"ended": self._swap(request["swap"])}
            self._answer(answer)

    def _receive(self) -> None:
        """Read requests. A closed socket ends the process at once, also during a swap."""
        try:
            for line in self._pipe.makefile("rb"):
                request = json.loads(line)
                if "stop" in request:
                    self._stop()
                    continue
                if "swap" in request:
                    self._stopped.clear()
                    self._swapping.set()
                self._requests.put(request)
        except Exception:
            traceback.print_exc()
        os._exit(0)  # nobody waits for an exit status, or for what is left to print

    def _stop(self) -> None:
        """Have FaceFusion end the swap. It looks at this state, but overwrites it when its workflow starts."""
        self._stopped.set()
        while self._swapping.is_set():
            _part("process_manager").stop()
            time.sleep(_STOP_SECONDS)

    def _answer(self, answer: dict[str, object]) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self._pipe.sendall(json.dumps(answer).encode() + b"\n")

    def _refuse(self, reason: str) -> None:
        self._answer({"unready": reason})
        sys.exit(2)

    def _load(self, arguments: list[str]) -> str:
        """Import FaceFusion, check its weights and its content filter, and load its models. Gives its version."""
        # Parts of its parser read the command line while they are made.
        sys.argv = ["facefusion.py", *arguments]
        if self._models is not None:
            _use_models(self._models)
        core = _part("core")
        if not core.pre_check():
            self._refuse("dependencies")
        signal.signal(signal.SIGINT, _part("exit_helper").signal_exit)
        self._program = core.create_program()
        if not core.validate_args(self._program):
            self._refuse("configuration")
        self._apply(arguments)
        _part("logger").init(_part("state_manager").get_item("log_level"))
        if not core.common_pre_check():
            self._refuse("content filter")
        # It reads all weights, so it is done once: the models that it has checked stay in memory.
        if not core.processors_pre_check():
            self._refuse("weights")
        for _ in self._sessions():
            pass
        # A FaceFusion that lacks one of these functions fails here, not with each task.
        self._forget()
        self._workflow = core.conditional_process
        return str(_part("metadata").get("version"))

    def _apply(self, arguments: Sequence[str]) -> None:
        """Set every argument of FaceFusion anew; those that are not given get their defaults."""
        given = vars(self._program.parse_args(arguments))
        _part("args").apply_args(given, _part("state_manager").init_item)

    def _sessions(self) -> Iterator[Any]:
        """The loaded models that a swap uses, as sessions of onnxruntime."""
        state = _part("state_manager")
        modules = []
        for module in _part("processors.core").get_processors_modules(state.get_item("processors")):
            modules += [*module.get_common_modules(), module]
        for module in modules:
            masked = {"occlusion", "region"} & set(state.get_item("face_mask_types") or ())
            if module.__name__.endswith(".face_masker") and not masked:
                continue  # its models are used for these two masks only
            yield from module.get_inference_pool().values()

    def _warm_up(self) -> bool:
        """Run each model once on zeros: on a GPU, the first run chooses the kernels. Failures are only printed."""
        numpy = importlib.import_module("numpy")
        for session in self._sessions():
            # The first dimension counts pictures, and often has no fixed size.
            shapes = {
                each.name: [size if isinstance(size, int) or at else 1 for at, size in enumerate(each.shape)]
                for each in session.get_inputs()
            }
            if all(isinstance(size, int) for shape in shapes.values() for size in shape):
                try:
                    session.run(None, {name: numpy.zeros(shape, "float32") for name, shape in shapes.items()})
                except Exception:
                    traceback.print_exc()
        return True

    def _swap(self, arguments: list[str]) -> int:
        """Run FaceFusion's workflow once, as `headless-run` does. Gives its error code, 0 for success."""
        _part("process_manager").end()
        self._forget()
        self._apply(arguments)
        if not _part("core").common_pre_check():
            self._refuse("content filter")
        error = _ENDED_EARLY if self._stopped.is_set() else int(self._workflow())
        self._swapping.clear()
        return error

    def _forget(self) -> None:
        """Clear what FaceFusion remembers of earlier pictures.

        It remembers pictures and the content filter's verdicts by path, and faces by a checksum of 32 bits. So
        another picture at the same path would get an earlier verdict, and memory would grow.
        """
        _part("content_analyser").analyse_image.cache_clear()
        _part("vision").read_static_image.cache_clear()
        _part("face_store").clear_faces()


def _use_models(folder: str) -> None:
    """Have FaceFusion use the weights of this folder, and neither download nor delete any."""
    filesystem = _part("filesystem")
    resolve = filesystem.resolve_relative_path

    def resolve_relative_path(path: str) -> str:
        if path == _MODELS or path.startswith(f"{_MODELS}/"):
            return folder + path.removeprefix(_MODELS)
        return str(resolve(path))

    filesystem.resolve_relative_path = resolve_relative_path  # before the modules that import it
    download = _part("download")
    download.conditional_download = lambda *_arguments: None
    download.remove_file = lambda _path: False
    download.resolve_download_url = lambda *_arguments: None


if __name__ == "__main__":
    main()
