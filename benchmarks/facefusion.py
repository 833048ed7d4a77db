"""FaceFusion loaded once against FaceFusion started for each picture: `python -m benchmarks.facefusion`.

INFERQ_FACEFUSION_HOME names its source, INFERQ_FACEFUSION_PYTHON its Python. A copy of the source gets the tiny
weights of the tests, and computes on the CPU. So the times are those of starting FaceFusion and of its own work
around the models; with full weights, each start also loads gigabytes. Both ways take turns. The first swap of each is
not counted.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil

from inferq.consumers.engine import Context
from inferq.consumers.facefusion.backend import Backend
from inferq.consumers.facefusion.headless import HeadlessBackend, find_python
from inferq.consumers.facefusion.resident import ResidentBackend
from inferq.consumers.facefusion.settings import FacefusionSettings

_TINY_WEIGHTS = Path(__file__).parent.parent / "tests" / "facefusion" / "tiny_weights.py"
_ROUNDS = 15
_PROVIDERS = ["cpu"]


def main() -> None:
    """Measure, and print a table with a row per way."""
    settings = FacefusionSettings.load()
    if settings.facefusion_home is None:
        raise SystemExit("set INFERQ_FACEFUSION_HOME to FaceFusion's folder")
    python = find_python(settings.facefusion_home, settings.facefusion_python)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder, "home")
        shutil.copytree(settings.facefusion_home / "facefusion", home / "facefusion")
        shutil.copy(settings.facefusion_home / "facefusion.py", home)
        subprocess.run([python, str(_TINY_WEIGHTS), str(home / ".assets" / "models")], check=True)
        began = time.monotonic()
        resident = ResidentBackend(home=home, python=python, providers=_PROVIDERS)
        resident.warm_up()
        loaded = time.monotonic() - began
        ways: dict[str, Backend] = {
            "a process for each picture": HeadlessBackend(home=home, python=python, providers=_PROVIDERS),
            "loaded once": resident,
        }
        seconds: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        for number in range(_ROUNDS + 1):
            for way, backend in ways.items():
                seconds[way].append(
                    _measured(lambda b=backend, n=f"{way} {number}": _swap(b, Path(folder, n)))
                )
        resident.close()
    print(f"FaceFusion {resident.info.version}, loaded and warmed up in {loaded:.1f} s")
    print("| way | a picture, s (median) | CPU time of a picture, s (median) |")
    print("| --- | --- | --- |")
    for way, taken in seconds.items():
        medians = [statistics.median(column) for column in zip(*taken[1:], strict=True)]
        print(f"| {way} | {medians[0]:.2f} | {medians[1]:.2f} |")


def _swap(backend: Backend, folder: Path) -> None:
    source, target = (np.full((600, 512, 3), colour, np.uint8) for colour in ((30, 60, 200), 128))
    context = Context(folder, {}, lambda *_: None, lambda: False)
    backend.swap(source, target, "largest", context)


def _measured(swap: Callable[[], None]) -> tuple[float, float]:
    """Seconds, and CPU seconds of this process with all its children."""
    began, used = time.monotonic(), _cpu_seconds()
    swap()
    return time.monotonic() - began, _cpu_seconds() - used


def _cpu_seconds() -> float:
    this = psutil.Process()
    times = [process.cpu_times() for process in (this, *this.children(recursive=True))]
    return sum(each.user + each.system + each.children_user + each.children_system for each in times)


if __name__ == "__main__":
    main()
