"""FaceFusion, installed in a folder and an environment of its own: one headless run per task."""

from __future__ import annotations

import codecs
import os
import re
import select
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from inferq.consumers.facefusion import FaceChoice, group_runner
from inferq.consumers.facefusion.backend import Swap, no_face_found
from inferq.consumers.facefusion.precision import SWAPPERS
from inferq.consumers.media.pictures import PixelLimit, RgbImage, open_picture
from inferq.engine import Context
from inferq.schemas import (
    EngineInfo,
    InferqError,
    InstallationError,
    InvalidTask,
    TransientFailure,
    expand_home,
)

LOOK_SECONDS = 0.1
"""How often a run checks whether it has to stop, in seconds."""
_START_SECONDS = 180
"""Seconds that FaceFusion may take to print its version; it imports its frameworks first."""
KEPT_LINES = 40
"""The number of output lines that are kept, the last ones; errors quote them."""
_LONGEST_LINE = 2000
_SAME = 2
"""The most by which an unchanged picture may differ after FaceFusion, of 255."""


@dataclass(frozen=True)
class _Stage:
    """An output line that shows progress; a percentage in it maps to the range from `begin` to `end`."""

    pattern: re.Pattern[str]
    begin: float
    end: float
    note: str


def _stage(pattern: str, begin: float, end: float, note: str) -> _Stage:
    return _Stage(re.compile(pattern, re.IGNORECASE), begin, end, note)


_STAGES = (
    _stage(r"downloading", 0.05, 0.15, "downloading weights"),
    _stage(r"processing step", 0.15, 0.15, "checking the pictures"),
    _stage(r"analysing", 0.15, 0.3, "checking the pictures"),
    _stage(r"copying image", 0.3, 0.3, "preparing the target"),
    _stage(r"finali[sz]ing image", 0.85, 0.85, "finishing the picture"),
    _stage(r"processing to image suc", 0.9, 0.9, "finishing the picture"),
    _stage(r"processing", 0.4, 0.85, "swapping"),
)
_PERCENTAGE = re.compile(r"(\d{1,3})%\|")
_COMPLAINT = re.compile(
    r"traceback|error|exception|fail|invalid|unable|cannot|could not|not (found|installed|loaded|supported)"
    r"|choose an? |specify |match the target|killed",
    re.IGNORECASE,
)
_OUT_OF_MEMORY = re.compile(
    r"out of memory|failed to allocate memory|alloc_failed|resourceexhausted", re.IGNORECASE
)


class HeadlessBackend:
    """Runs `facefusion.py headless-run`. Its content filter stays on."""

    preview = False

    def __init__(
        self, *, home: Path | None, python: str | None, providers: Sequence[str], swapper: str | None = None
    ) -> None:
        """Locates FaceFusion in `home` and runs it with `python` to get its version.

        `providers` are its execution providers, `swapper` its face swapper, by default that of its own
        configuration. Raises InstallationError if FaceFusion is missing or cannot run.
        """
        self._home = checked_home(home)
        self._python = find_python(self._home, python)
        self._arguments = base_arguments(providers, swapper)
        self.info = EngineInfo(
            name="facefusion",
            version=_version(self._home, self._python),
            model=swapper or "face_swapper",
            device=",".join(providers),
            precision=SWAPPERS[swapper] if swapper is not None else None,
        )

    def warm_up(self) -> None:
        """Does nothing: each run starts a new process."""

    def close(self) -> None:
        """Does nothing: no state is kept between runs."""

    def swap(self, source: RgbImage, target: RgbImage, face: FaceChoice, context: Context) -> Swap:
        """The target with the selected faces replaced. FaceFusion does not report which ones it found."""
        folder = context.scratch / "facefusion"
        folder.mkdir()
        try:
            write_pictures(folder, source, target)
            code, lines = self._run(self._command(folder, face), folder, context)
            failure = judge(code, wrote_output(folder), lines)
            if failure is not None:
                raise failure
            return Swap(swapped_picture(folder, target))
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _command(self, folder: Path, face: FaceChoice) -> list[str]:
        # Each run has its own folder of jobs: runs that share one take each other's jobs.
        return [
            *(self._python, "facefusion.py", *self._arguments),
            *picture_arguments(folder, face),
            *("--jobs-path", str(folder / "jobs")),
        ]

    def _run(self, command: Sequence[str], folder: Path, context: Context) -> tuple[int, list[str]]:
        """The exit status of a command, and the last lines of its output."""
        lines: deque[str] = deque(maxlen=KEPT_LINES)
        process = subprocess.Popen(
            [sys.executable, "-I", str(group_runner.__file__), *command],
            cwd=self._home,
            env=environment(folder / "temp"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            process_group=0,  # the runner outlives the engine's group, to kill FaceFusion's
        )
        try:
            for line in _output_lines(process, context):
                lines.append(line)
                if (progress := read_progress(line)) is not None:
                    context.progress(*progress)
            return process.wait(), list(lines)
        finally:
            end_process(process)


def base_arguments(providers: Sequence[str], swapper: str | None = None) -> list[str]:
    """The arguments of FaceFusion that are the same for each picture."""
    chosen = ["--face-swapper-model", swapper] if swapper is not None else []
    return [
        *("headless-run", "--processors", "face_swapper", *chosen),
        *("--execution-providers", *providers),
        *("--log-level", "info"),
    ]


def picture_arguments(folder: Path, face: FaceChoice) -> list[str]:
    """The arguments of FaceFusion for the pictures in `folder`."""
    if face == "all":
        chosen = ["many"]
    elif face == "largest":
        chosen = ["one"]
    else:
        # 0.05 is the smallest distance that FaceFusion accepts: only the selected face is this near.
        chosen = ["reference", "--reference-face-position", str(face), "--reference-face-distance", "0.05"]
    return [
        *("-s", str(folder / "source.png"), "-t", str(folder / "target.png")),
        *("-o", str(folder / "output.png"), "--temp-path", str(folder / "temp")),
        *("--face-selector-order", "large-small", "--face-selector-mode", *chosen),
    ]


def write_pictures(folder: Path, source: RgbImage, target: RgbImage) -> None:
    """Write both as upright, lossless PNG; FaceFusion needs an output of the target's format."""
    (folder / "temp").mkdir()
    for name, picture in (("source", source), ("target", target)):
        Image.fromarray(picture).save(folder / f"{name}.png", compress_level=1)


def wrote_output(folder: Path) -> bool:
    """Whether FaceFusion wrote a picture."""
    output = folder / "output.png"
    return output.is_file() and output.stat().st_size > 0


def judge(code: int, has_output: bool, lines: Sequence[str]) -> InferqError | None:
    """The error to raise for a run with this exit status and these last output lines; None for success.

    FaceFusion exits with 0 when it is interrupted, with 2 for bad arguments, and with 1 for everything else. That
    includes its content filter, which prints nothing.
    """
    said = "\n".join(lines)
    last = last_words(lines)
    if code == 0 and has_output:
        return None
    if "no source face detected" in said.lower():
        return no_face_found("source")
    if _OUT_OF_MEMORY.search(said):
        return TransientFailure(
            f"the GPU has too little free memory for FaceFusion; its output: {last}", code="out_of_memory"
        )
    if code == 0:
        return TransientFailure(
            f"FaceFusion ended without a picture, probably because it was interrupted; its output: {last}",
            code="engine_error",
        )
    if code == 2:
        return TransientFailure(
            "FaceFusion refused its arguments or its environment: check INFERQ_FACEFUSION_PROVIDERS, its "
            f"version (3.8 is known to work), and that curl and ffmpeg are installed; its output: {last}",
            code="engine_misconfigured",
        )
    if code > 128:
        return TransientFailure(
            f"FaceFusion was killed by signal {code - 128}"
            + (", most likely because memory ran out" if code == 128 + 9 else "")
            + f"; its output: {last}",
            code="engine_died",
        )
    if code == 1 and "processing step" in said.lower() and not _COMPLAINT.search(said):
        return InvalidTask(
            "FaceFusion refused these pictures without a reason: most likely its content filter rejected one "
            "of them; send other pictures",
            code="content_refused",
        )
    return TransientFailure(f"FaceFusion failed with status {code}; its output: {last}", code="engine_error")


def last_words(lines: Sequence[str]) -> str:
    """The last of these lines, for an error."""
    return " | ".join(line for line in lines[-5:] if line)[-800:] or "nothing"


def read_progress(line: str) -> tuple[float, str] | None:
    """The progress from 0 to 1 and the current step, if a line of FaceFusion's output shows them; else None."""
    for stage in _STAGES:
        if stage.pattern.search(line):
            found = _PERCENTAGE.search(line)
            share = min(int(found[1]), 100) / 100 if found else 0.0
            return stage.begin + share * (stage.end - stage.begin), stage.note
    return None


def _output_lines(process: subprocess.Popen[bytes], context: Context) -> Iterator[str]:
    """Yield the lines of its output until it ends. Raises TaskAborted if the run has to stop."""
    if process.stdout is None:
        raise RuntimeError("the process was started without a pipe")
    descriptor = process.stdout.fileno()
    poller = select.poll()
    poller.register(descriptor, select.POLLIN | select.POLLHUP)
    splitter = LineSplitter()
    while True:
        context.check_abort()
        if not poller.poll(LOOK_SECONDS * 1000):
            continue
        data = os.read(descriptor, 65536)
        yield from splitter.feed(data)
        if not data:
            return


class LineSplitter:
    """Splits output into lines. Progress bars end with a carriage return instead of a newline."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._rest = ""

    def feed(self, data: bytes) -> list[str]:
        """The lines that these bytes complete, without blank ones. No bytes are the end of the output."""
        *whole, rest = re.split(r"[\r\n]+", self._rest + self._decoder.decode(data, final=not data))
        if not data:
            whole, rest = [*whole, rest], ""
        self._rest = rest[-_LONGEST_LINE:]
        return [line.strip()[:_LONGEST_LINE] for line in whole if line.strip()]


def end_process(process: subprocess.Popen[bytes]) -> None:
    """End all processes of the run: the group runner kills the whole group when its pipe closes."""
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):
                pipe.close()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def swapped_picture(folder: Path, target: RgbImage) -> RgbImage:
    """The picture that FaceFusion wrote. Raises InvalidTask if it is the unchanged target."""
    height, width = target.shape[:2]
    try:
        with open_picture(folder / "output.png", PixelLimit(4 * width * height, "nothing")) as picture:
            swapped = picture.decode()
    except InvalidTask as error:
        raise TransientFailure(
            f"FaceFusion wrote a picture that cannot be read: {error.message}", code="engine_error"
        ) from error
    if swapped.shape == target.shape and _differs_by(swapped, target) <= _SAME:
        raise no_face_found("target")
    return swapped


def _differs_by(one: RgbImage, other: RgbImage) -> int:
    return int((np.maximum(one, other) - np.minimum(one, other)).max())


def environment(temporary: Path | None = None) -> dict[str, str]:
    """This process's environment without inferq's settings, which include passwords. `temporary` sets TMPDIR."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("INFERQ_")}
    kept.update({"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"})
    return kept if temporary is None else {**kept, "TMPDIR": str(temporary)}


def checked_home(home: Path | None) -> Path:
    """The absolute path of FaceFusion's folder. Raises InstallationError if it is not there."""
    if home is None:
        raise InstallationError(
            "INFERQ_FACEFUSION_HOME is not set: set it to FaceFusion's folder (a clone of "
            "https://github.com/facefusion/facefusion, installed by its install.py), or set "
            "INFERQ_FACEFUSION_BACKEND=preview",
            code="engine_not_installed",
        )
    home = expand_home("INFERQ_FACEFUSION_HOME", home).absolute()
    if not home.is_dir():
        raise InstallationError(
            f"INFERQ_FACEFUSION_HOME {home} is not a folder: set it to FaceFusion's folder",
            code="engine_not_installed",
        )
    if not (home / "facefusion.py").is_file():
        raise InstallationError(
            f"INFERQ_FACEFUSION_HOME {home} has no facefusion.py: set it to FaceFusion's folder",
            code="engine_not_installed",
        )
    return home


def find_python(home: Path, setting: str | None) -> str:
    own = home / ".venv" / "bin" / "python"
    wanted = setting or (str(own) if own.is_file() else "python3")
    found = shutil.which(expand_home("INFERQ_FACEFUSION_PYTHON", Path(wanted)))
    if found is None:
        raise InstallationError(
            f"FaceFusion's Python {wanted} is missing or cannot be run: set INFERQ_FACEFUSION_PYTHON to "
            "the Python of its environment",
            code="engine_not_installed",
        )
    return str(Path(found).absolute())


def _version(home: Path, python: str) -> str:
    """The version that FaceFusion prints. To print it, it imports everything that it needs."""
    asked = [python, "facefusion.py", "--version"]
    try:
        answer = subprocess.run(
            asked,
            cwd=home,
            env=environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_START_SECONDS,
            text=True,
            errors="replace",
        )
    except subprocess.TimeoutExpired as error:
        raise InstallationError(
            f"{' '.join(asked)} in {home} did not answer within {_START_SECONDS} s: run it by hand to see why",
            code="engine_not_loadable",
        ) from error
    except OSError as error:
        raise InstallationError(
            f"{python} cannot be run: {error.strerror}; set INFERQ_FACEFUSION_PYTHON to a Python that can",
            code="engine_not_loadable",
        ) from error
    if answer.returncode != 0:
        said = " | ".join((answer.stderr + answer.stdout).strip().splitlines()[-3:])[-600:]
        raise InstallationError(
            f"FaceFusion in {home} does not start under {python} (status {answer.returncode}: "
            f"{said or 'no output'}): install it with its install.py, set INFERQ_FACEFUSION_PYTHON to the Python "
            "(3.12 or later) of its environment, and install curl and ffmpeg",
            code="engine_not_loadable",
        )
    words = answer.stdout.split()
    return words[-1] if words else "unknown"
