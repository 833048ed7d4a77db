"""What batching brings on a GPU, and whether a share of its memory is kept: `python -m benchmarks.gpu`.

It needs no GPU: a simulated engine computes n tasks together in (a + b·n) seconds, through a real worker. What a GPU
is needed for is run if there is one, and else the reason is printed. It takes less than ten minutes in all.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.engines import Work, ocr_pages, stored_inputs, task_of
from benchmarks.site import Site, site, wait_until
from inferq.broker import Publisher, task_message, topology_for
from inferq.consumers.machine import gpu_fault, gpu_memory_bytes
from inferq.producer.up.part import free_ports
from inferq.schemas import Result, new_task_id

Say = Callable[[str], None]
Samples = dict[str, list[tuple[dict[str, str], float]]]

BATCHES = (1, 8)
FRACTION = 0.3
"""The share of the GPU's memory that the engines on a GPU get here."""
_BATCH, _TASK = 0.02, 0.001
"""The simulated engine's a and b, in seconds: a kernel start that costs as much as twenty tasks."""


@dataclass(frozen=True)
class Measured:
    """Of one worker: tasks a second, the engine's busy share, and the tasks in a batch.

    `gpu` is the share of the GPU's time that the engine used, the mean over the run, and `memory` the most bytes of
    the GPU that it had; both are 0 where the driver does not say.
    """

    rate: float
    busy: float
    batch: float
    gpu: float
    memory: float
    results: Sequence[Result]


def through_a_worker(
    ground: Site, type_name: str, work: Sequence[Work], *, batch: int, warm: int, settings: Mapping[str, str]
) -> Measured:
    """Have the work done by one worker, after `warm` tasks that are not counted."""
    results, port = ground.results(), free_ports(1)[0]
    stored_inputs(ground, work)
    publisher = Publisher(ground.broker(), name="bench", topology=topology_for([type_name]))
    publisher.start()

    def run(items: Sequence[Work]) -> list[Result]:
        ids = [new_task_id() for _ in items]
        sent = [
            publisher.publish(task_message(task_of(type_name, task_id, item)))
            for task_id, item in zip(ids, items, strict=True)
        ]
        for confirmed in sent:
            confirmed.result(20)
        found: dict[str, Result] = {}

        def all_ended() -> bool:
            if time.monotonic() - scraped[-1][0] >= 1:
                scraped.append((time.monotonic(), metrics(port)))
            for task_id in ids[len(found) :]:
                if (result := results.load("default", task_id)) is None:
                    return False
                if result.status != "succeeded":
                    raise RuntimeError(f"{task_id}: {result.error}")
                found[task_id] = result
            return True

        wait_until(all_ended, 300)
        return list(found.values())

    given = {
        "INFERQ_LANES": "normal",
        "INFERQ_BATCH_SIZE": str(batch),
        "INFERQ_PROBE_PORT": str(port),
        **settings,
    }
    with ground.inferq_worker(type_name, **given):
        wait_until(lambda: _answers(port))
        scraped = [(time.monotonic(), metrics(port))]
        run(work[:1] * warm)
        scraped = [(time.monotonic(), before := metrics(port))]
        ended = run(work)
        scraped.append((time.monotonic(), after := metrics(port)))
    publisher.close()
    first = min(result.started_at for result in ended if result.started_at)
    seconds = (max(result.finished_at for result in ended) - first).total_seconds()
    busy, alive = (
        total(after, name) - total(before, name)
        for name in ("inferq_engine_busy_seconds_total", "inferq_engine_alive_seconds_total")
    )
    sizes = [result.batch_size for result in ended]
    during = [samples for _, samples in scraped[1:]]
    return Measured(
        rate=len(ended) / seconds,
        busy=busy / alive,
        batch=statistics.harmonic_mean(sizes),
        gpu=statistics.mean(total(samples, "inferq_gpu_process_utilization_ratio") for samples in during),
        memory=max(total(samples, "inferq_gpu_process_memory_bytes") for samples in during),
        results=ended,
    )


def _answers(port: int) -> bool:
    try:
        return bool(metrics(port))
    except OSError:
        return False


def metrics(port: int) -> Samples:
    """The worker's metrics: by name, the labels and values."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as page:
        families = text_string_to_metric_families(page.read().decode())
    found: Samples = {}
    for family in families:
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def total(samples: Samples, name: str) -> float:
    return sum(value for _, value in samples.get(name, []))


def simulated(ground: Site, share: int, say: Say) -> None:
    """The simulated GPU, one by one and in batches."""
    say("## A simulated GPU: n tasks together in (a + b·n) seconds, through a worker")
    say("")
    say(
        f'a = {_BATCH * 1000:g} ms, b = {_TASK * 1000:g} ms. "Possible" is the engine alone, in full batches.'
    )
    say("Busy is the share of the time between the first and the last batch in which the engine computed.")
    say("")
    say("| INFERQ_BATCH_SIZE | tasks/s | of the possible | busy | tasks a batch |")
    say("| ---: | ---: | ---: | ---: | ---: |")
    settings = {"INFERQ_SIMGPU_BATCH": str(_BATCH), "INFERQ_SIMGPU_TASK": str(_TASK)}
    for batch in BATCHES:
        count = 200 * batch // share
        found = through_a_worker(
            ground, "simgpu", [Work()] * count, batch=batch, warm=2 * batch, settings=settings
        )
        outputs = [result.output for result in found.results if isinstance(result.output, dict)]
        computed = {float(output["began"]): (output["seconds"], output["batch"]) for output in outputs}
        begins = sorted(computed)
        seconds = [float(computed[began][0]) for began in begins]
        busy = sum(seconds) / (begins[-1] + seconds[-1] - begins[0])
        possible = batch / (_BATCH + _TASK * batch)
        say(
            f"| {batch} | {found.rate:.1f} | {found.rate / possible:.3f} | {busy:.3f} "
            f"| {len(outputs) / len(computed):.2f} |"
        )


def on_a_gpu(ground: Site, share: int, say: Say) -> None:
    """ACE-Step with random weights, and OCR: one by one and in batches, within a share of the GPU's memory."""
    say("## On a GPU")
    say("")
    if (fault := gpu_fault(0)) is not None:
        say(f"Not run: {fault}.")
        return
    memory = gpu_memory_bytes(0)
    say(f"GPU 0 has {memory / 1e9:.0f} GB; INFERQ_GPU_MEMORY_FRACTION={FRACTION:g}.")
    say("")
    say(
        "| engine | batch | tasks/s | busy | tasks a batch | GPU in use | memory of the engine, of its share |"
    )
    say("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    left_out = []
    for name, prepare in (("acestep", _acestep), ("ocr", _ocr)):
        with prepare() as (work, settings, reason):
            if reason:
                left_out.append(f"{name}: not run: {reason}.")
                continue
            for batch in BATCHES:
                given = {"INFERQ_GPU_MEMORY_FRACTION": str(FRACTION), **settings}
                found = through_a_worker(
                    ground, name, work[:: 2 * share], batch=batch, warm=batch, settings=given
                )
                shares = f"{found.memory / memory / FRACTION:.2f}" if found.memory else "not known"
                engine = found.results[0].engine
                say(
                    f"| {engine.name if engine else name} | {batch} | {found.rate:.2f} | {found.busy:.3f} "
                    f"| {found.batch:.2f} | {found.gpu:.2f} | {shares} |"
                )
    say("")
    for line in left_out:
        say(line)
    _limits(say)


Prepared = tuple[list[Work], dict[str, str], str]


@contextmanager
def _acestep() -> Iterator[Prepared]:
    if missing := _missing("torch", "diffusers", "transformers"):
        yield [], {}, missing
        return
    import torch

    if not torch.cuda.is_available():
        yield [], {}, f"torch {torch.__version__} finds no GPU"
        return
    from tests.acestep.tiny import make_weights

    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "INFERQ_DEVICE": "cuda",
            "INFERQ_ACESTEP_BACKEND": "diffusers",
            "INFERQ_ACESTEP_MODEL_DIR": str(make_weights(Path(folder) / "tiny", turbo=True)),
        }
        work = [
            Work({"prompt": "calm piano and strings", "duration": 10.0, "seed": seed}) for seed in range(96)
        ]
        yield work, settings, ""


@contextmanager
def _ocr() -> Iterator[Prepared]:
    """PaddleOCR where paddle has CUDA and its weights are named, else RapidOCR."""
    work = ocr_pages(96)
    if os.environ.get("INFERQ_OCR_MODEL_DIR") and not _missing("paddle", "paddleocr"):
        import paddle

        if paddle.device.is_compiled_with_cuda():
            yield work, {"INFERQ_DEVICE": "cuda", "INFERQ_OCR_BACKEND": "paddleocr"}, ""
            return
    if missing := _missing("onnxruntime", "rapidocr"):
        yield [], {}, missing
        return
    import onnxruntime

    offered = onnxruntime.get_available_providers()
    reason = "" if "CUDAExecutionProvider" in offered else f"onnxruntime has only {', '.join(offered)}"
    yield work, {"INFERQ_DEVICE": "cuda"}, reason


def _missing(*modules: str) -> str:
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    return f"{', '.join(absent)} is not installed" if absent else ""


_BLOCK = 64 << 20
_FILL = {
    "torch": """
import torch
from inferq.engine import limit_torch_memory
limit_torch_memory(torch, "cuda:0", {fraction})
take = lambda: torch.empty({block}, dtype=torch.uint8, device="cuda:0")
""",
    "paddle": """
from inferq.engine import limit_paddle_memory
limit_paddle_memory(0, {fraction})
import paddle
take = lambda: paddle.zeros([{block}], dtype="uint8")
""",
}
"""Programs that set the limit as the engines do, and say how to take a block of GPU memory."""
_UNTIL_REFUSED = """
held = []
try:
    while True:
        held.append(take())
except Exception as error:
    print(len(held) * {block}, type(error).__name__)
"""


def _limits(say: Say) -> None:
    """Fill each framework's memory until it refuses, and compare with the limit."""
    memory = gpu_memory_bytes(0)
    say("")
    say("| framework | memory that it gave, of its share | then |")
    say("| --- | ---: | --- |")
    for name, program in _FILL.items():
        if missing := _missing(name):
            say(f"| {name} | | not run: {missing} |")
            continue
        code = (program + _UNTIL_REFUSED).format(fraction=FRACTION, block=_BLOCK)
        ended = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
        )
        if ended.returncode:
            say(f"| {name} | | {ended.stderr.strip().splitlines()[-1]} |")
            continue
        taken, error = ended.stdout.split()[-2:]
        say(f"| {name} | {int(taken) / memory / FRACTION:.3f} | {error} |")


def main() -> None:
    quick = "--quick" in sys.argv
    began = time.monotonic()
    with site() as ground:
        os.environ.update(ground.environment())
        for part in (simulated, on_a_gpu):
            part(ground, 10 if quick else 1, lambda text: print(text, flush=True))
            print(flush=True)
    print(f"{time.monotonic() - began:.0f} s in all")


if __name__ == "__main__":
    main()
