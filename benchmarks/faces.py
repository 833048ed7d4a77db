"""The cost of facefusion's preview: `taskset -c 0 python -m benchmarks.faces` measures it on one core.

It swaps the faces of the sample portraits at several sizes of the target. Times are CPU times, so other load on
the machine has little influence. The first swap is not counted.
"""

from __future__ import annotations

import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from inferq.consumers.engine import Context, InputFile
from inferq.consumers.facefusion import FacefusionTask
from inferq.consumers.facefusion.engine import FacefusionEngine

_SAMPLES = Path(__file__).parent.parent / "examples" / "portraits"
_SIZES = ((512, 600), (1000, 750), (4000, 3000))
_ROUNDS = 15


def main() -> None:
    """Measure, and print a table with a row per size."""
    engine = FacefusionEngine()
    engine.load()
    engine.warm_up()
    source, portrait = _SAMPLES / "portrait_collins.png", _SAMPLES / "portrait_hopper.jpg"
    print("| target | swap alone, ms | with decoding and encoding (JPEG), ms | peak memory so far, MB |")
    print("| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for size in _SIZES:
            target = Path(folder, f"{size[0]}.jpg")
            with Image.open(portrait) as image:
                image.resize(size, Image.Resampling.LANCZOS).save(target, quality=92)
            alone, whole = [], []
            for number in range(_ROUNDS + 1):
                alone.append(_swap_alone(engine, source, target))
                whole.append(_whole_run(engine, source, target, Path(folder, f"{size[0]}-{number}")))
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
            milliseconds = [f"{statistics.median(times[1:]) * 1000:.0f}" for times in (alone, whole)]
            print(f"| {size[0]}×{size[1]} | {' | '.join(milliseconds)} | {memory:.0f} |")


def _swap_alone(engine: FacefusionEngine, source: Path, target: Path) -> float:
    pictures = []
    for path in (source, target):
        with Image.open(path) as image:
            pictures.append(np.array(image.convert("RGB"), np.uint8))
    context = Context(Path(), {}, lambda _fraction, _note: None, lambda: False)
    began = time.process_time()
    engine._backend.swap(pictures[0], pictures[1], "largest", context)
    return time.process_time() - began


def _whole_run(engine: FacefusionEngine, source: Path, target: Path, scratch: Path) -> float:
    task = FacefusionTask.model_validate(
        {
            "task_id": "measured",
            "task_type": "facefusion",
            "source_url": "https://example.com/source.png",
            "target_url": "https://example.com/target.jpg",
            "options": {"format": "jpeg"},
        }
    )
    inputs = {
        "source_url": InputFile(source, source.stat().st_size, ""),
        "target_url": InputFile(target, target.stat().st_size, ""),
    }
    context = Context(scratch, inputs, lambda _fraction, _note: None, lambda: False)
    began = time.process_time()
    engine.run(task, context)
    return time.process_time() - began


if __name__ == "__main__":
    main()
