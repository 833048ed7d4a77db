"""FaceFusion, which lives in a folder and an environment of its own: one headless run of it per task."""

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
from inferq.consumers.media.pictures import PixelLimit, RgbImage, open_picture
from inferq.engine import Context
from inferq.schemas import EngineInfo, InferqError, InstallationError, InvalidTask, TransientFailure

_LOOK_SECONDS = 0.1
"""How often a run is asked whether to stop."""
_START_SECONDS = 180
"""Seconds that FaceFusion may take to say its version; it imports its frameworks for that."""
_KEPT_LINES = 40
"""How many of the last lines of its output are kept, and quoted where it fails."""
_LONGEST_LINE = 2000
_SAME = 2
"""By how much, of 255, a picture may differ that went through FaceFusion untouched."""


@dataclass(frozen=True)
class _Stage:
    """A line of its output that tells how far it is; a percentage in it goes from `begin` to `end`."""

    pattern: re.Pattern[str]
    begin: float
    end: float
    note: str


def _stage(pattern: str, begin: float, end: float, note: str) -> _Stage:
    return _Stage(re.compile(pattern, re.IGNORECASE), begin, end, note)


_STAGES = (
    _stage(r"downloading", 0.05, 0.15, "downloading weights"),
    _stage(r"processing step", 0.15, 0.15, "looking at the pictures"),
    _stage(r"analysing", 0.15, 0.3, "looking at the pictures"),
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
    """Runs `facefusion.py headless-run`. Its content filter stays as it is: nothing here turns it off."""

    preview = False

    def __init__(self, *, home: Path | None, python: str | None, providers: Sequence[str]) -> None:
        """Finds FaceFusion below `home` and asks for its version, run by `python`.

        `providers` are what it computes with. Raises InstallationError where it is not there or cannot run.
        """
        self._home = _checked_home(home)
        self._python = _find_python(self._home, python)
        self._providers = tuple(providers)
        self.info = EngineInfo(
            name="facefusion",
            version=_version(self._home, self._python),
            model="face_swapper",
            device=",".join(providers),
        )

    def warm_up(self) -> None:
        """Nothing: each run starts anew."""

    def close(self) -> None:
        """Nothing is kept between runs."""

    def swap(self, source: RgbImage, target: RgbImage, face: FaceChoice, context: Context) -> Swap:
        """The target with the source's face in place of those chosen; which they were is not known."""
        folder = context.scratch / "facefusion"
        folder.mkdir()
        try:
            # Upright and lossless, whatever came in; the output must be of the target's kind.
            for name, picture in (("source", source), ("target", target)):
                Image.fromarray(picture).save(folder / f"{name}.png", compress_level=1)
            output = folder / "output.png"
            code, lines = self._run(self._command(folder, face), folder, context)
            failure = judge(code, output.is_file() and output.stat().st_size > 0, lines)
            if failure is not None:
                raise failure
            return Swap(_swapped(output, target))
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _command(self, folder: Path, face: FaceChoice) -> list[str]:
        if face == "all":
            chosen = ["many"]
        elif face == "largest":
            chosen = ["one"]
        else:
            # 0.05 is the least distance that it takes: no other face is as near to the one meant.
            chosen = [
                "reference",
                "--reference-face-position",
                str(face),
                "--reference-face-distance",
                "0.05",
            ]
        # Each run has jobs of its own: two that share a folder of them take each other's.
        return [
            *(self._python, "facefusion.py", "headless-run"),
            *("-s", str(folder / "source.png"), "-t", str(folder / "target.png")),
            *("-o", str(folder / "output.png")),
            *("--processors", "face_swapper"),
            *("--face-selector-order", "large-small", "--face-selector-mode", *chosen),
            *("--execution-providers", *self._providers),
            *("--jobs-path", str(folder / "jobs"), "--temp-path", str(folder / "temp")),
            *("--log-level", "info"),
        ]

    def _run(self, command: Sequence[str], folder: Path, context: Context) -> tuple[int, list[str]]:
        """The exit status of a command, and the last lines that it said."""
        (folder / "temp").mkdir()
        lines: deque[str] = deque(maxlen=_KEPT_LINES)
        process = subprocess.Popen(
            [sys.executable, "-I", str(group_runner.__file__), *command],
            cwd=self._home,
            env=_environment(folder / "temp"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            process_group=0,  # it has to outlive the engine's group, to end FaceFusion's
        )
        try:
            for line in _said(process, context):
                lines.append(line)
                if (progress := read_progress(line)) is not None:
                    context.progress(*progress)
            return process.wait(), list(lines)
        finally:
            _end(process)


def judge(code: int, has_output: bool, lines: Sequence[str]) -> InferqError | None:
    """What to raise for a run that ended with this exit status, having said these lines; None is success.

    FaceFusion exits with 0 when it is interrupted, with 2 for arguments that it does not take, and with 1 for
    all else, which may be its content filter: that says nothing at all.
    """
    said = "\n".join(lines)
    last = " | ".join(line for line in lines[-5:] if line)[-800:] or "nothing"
    if code == 0 and has_output:
        return None
    if "no source face detected" in said.lower():
        return no_face_found("source")
    if _OUT_OF_MEMORY.search(said):
        return TransientFailure(
            f"the GPU has too little free memory for FaceFusion; it said: {last}", code="out_of_memory"
        )
    if code == 0:
        return TransientFailure(
            f"FaceFusion ended without a picture, as it does when it is interrupted; it said: {last}",
            code="engine_error",
        )
    if code == 2:
        return TransientFailure(
            "FaceFusion refuses its arguments or its surroundings: check INFERQ_FACEFUSION_PROVIDERS, its "
            f"version (3.8 is known to work), and that curl and ffmpeg are there; it said: {last}",
            code="engine_misconfigured",
        )
    if code > 128:
        return TransientFailure(
            f"FaceFusion was killed by signal {code - 128}"
            + (", most likely for its memory" if code == 128 + 9 else "")
            + f"; it said: {last}",
            code="engine_died",
        )
    if code == 1 and "processing step" in said.lower() and not _COMPLAINT.search(said):
        return InvalidTask(
            "FaceFusion refuses these pictures without saying why: most likely its content filter takes one "
            "of them for unfit; send others",
            code="content_refused",
        )
    return TransientFailure(f"FaceFusion failed with status {code}; it said: {last}", code="engine_error")


def read_progress(line: str) -> tuple[float, str] | None:
    """How far FaceFusion is, from 0 to 1, and what it does, if a line of its output tells."""
    for stage in _STAGES:
        if stage.pattern.search(line):
            found = _PERCENTAGE.search(line)
            share = min(int(found[1]), 100) / 100 if found else 0.0
            return stage.begin + share * (stage.end - stage.begin), stage.note
    return None


def _said(process: subprocess.Popen[bytes], context: Context) -> Iterator[str]:
    """The lines of its output as they come, until it ends. Raises TaskAborted once the run is to stop."""
    if process.stdout is None:
        raise RuntimeError("the process was started without a pipe")
    descriptor = process.stdout.fileno()
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    poller = select.poll()
    poller.register(descriptor, select.POLLIN | select.POLLHUP)
    rest = ""
    while True:
        context.check_abort()
        if not poller.poll(_LOOK_SECONDS * 1000):
            continue
        data = os.read(descriptor, 65536)
        # Progress bars return to the beginning of their line instead of ending it.
        *whole, rest = re.split(r"[\r\n]+", rest + decoder.decode(data, final=not data))
        rest = rest[-_LONGEST_LINE:]
        yield from (line.strip()[:_LONGEST_LINE] for line in whole if line.strip())
        if not data:
            if rest.strip():
                yield rest.strip()
            return


def _end(process: subprocess.Popen[bytes]) -> None:
    """See to it that nothing of the run is left: the warden ends the whole group when its pipe closes."""
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):
                pipe.close()
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _swapped(output: Path, target: RgbImage) -> RgbImage:
    """The picture that FaceFusion wrote. Raises InvalidTask where it is the target, untouched."""
    height, width = target.shape[:2]
    try:
        with open_picture(output, PixelLimit(4 * width * height, "nothing")) as picture:
            swapped = picture.decode()
    except InvalidTask as error:
        raise TransientFailure(
            f"FaceFusion wrote no proper picture: {error.message}", code="engine_error"
        ) from error
    if swapped.shape == target.shape and _differs_by(swapped, target) <= _SAME:
        raise no_face_found("target")
    return swapped


def _differs_by(one: RgbImage, other: RgbImage) -> int:
    return int((np.maximum(one, other) - np.minimum(one, other)).max())


def _environment(temporary: Path) -> dict[str, str]:
    """Ours without our settings, among which are passwords; temporary files go where they are swept up."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("INFERQ_")}
    return {**kept, "TMPDIR": str(temporary), "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}


def _checked_home(home: Path | None) -> Path:
    if home is None:
        raise InstallationError(
            "INFERQ_FACEFUSION_HOME is not set: set it to FaceFusion's folder (a clone of "
            "https://github.com/facefusion/facefusion, installed by its install.py), or set "
            "INFERQ_FACEFUSION_BACKEND=preview",
            code="engine_not_installed",
        )
    home = home.expanduser().absolute()
    if not home.is_dir():
        raise InstallationError(
            f"INFERQ_FACEFUSION_HOME {home} is not a folder: set it to FaceFusion's",
            code="engine_not_installed",
        )
    if not (home / "facefusion.py").is_file():
        raise InstallationError(
            f"INFERQ_FACEFUSION_HOME {home} has no facefusion.py: set it to the folder that has",
            code="engine_not_installed",
        )
    return home


def _find_python(home: Path, setting: str | None) -> str:
    own = home / ".venv" / "bin" / "python"
    wanted = setting or (str(own) if own.is_file() else "python3")
    found = shutil.which(Path(wanted).expanduser())
    if found is None:
        raise InstallationError(
            f"FaceFusion's Python {wanted} is not there or cannot be run: set INFERQ_FACEFUSION_PYTHON to "
            "the one of its environment",
            code="engine_not_installed",
        )
    return str(Path(found).absolute())


def _version(home: Path, python: str) -> str:
    """FaceFusion's version by its own word, for which it must import all that it needs."""
    asked = [python, "facefusion.py", "--version"]
    try:
        answer = subprocess.run(
            asked,
            cwd=home,
            env={**_environment(home), "TMPDIR": os.environ.get("TMPDIR", "/tmp")},  # noqa: S108
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_START_SECONDS,
            text=True,
            errors="replace",
        )
    except subprocess.TimeoutExpired as error:
        raise InstallationError(
            f"{' '.join(asked)} in {home} did not answer within {_START_SECONDS} s: run it by hand",
            code="engine_not_loadable",
        ) from error
    except OSError as error:
        raise InstallationError(
            f"{python} cannot be run: {error.strerror}; set INFERQ_FACEFUSION_PYTHON",
            code="engine_not_loadable",
        ) from error
    if answer.returncode != 0:
        said = " | ".join((answer.stderr + answer.stdout).strip().splitlines()[-3:])[-600:]
        raise InstallationError(
            f"FaceFusion in {home} does not start under {python} (status {answer.returncode}: "
            f"{said or 'no word'}): install it by its install.py, set INFERQ_FACEFUSION_PYTHON to the Python "
            "(3.12 or later) of its environment, and see that curl and ffmpeg are there",
            code="engine_not_loadable",
        )
    words = answer.stdout.split()
    return words[-1] if words else "unknown"
