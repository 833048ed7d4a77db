"""How accurate the engines are with coarser numbers: `python -m benchmarks.precision ner|ocr|acestep`.

It needs no GPU. Where a CPU does not compute in a format, or an engine does not have it, the weights are rounded to
the format and the computation stays in fp32: that shows what the weights lose, and not what the sums lose. `ocr`
needs `pip install onnx`, and `acestep` the environment of `make test-engines`.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def to_fp16(values: Floats) -> Floats:
    return values.astype(np.float16).astype(np.float32)


def to_bf16(values: Floats) -> Floats:
    """Rounded to the nearest number with the upper 16 bits of float32, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32)


def to_int8(values: Floats) -> Floats:
    """Rounded to 255 steps between the extremes of each column, as weights of products are quantized."""
    if values.ndim < 2:
        return values
    scale = np.abs(values).max(axis=tuple(range(values.ndim - 1)), keepdims=True) / 127
    return np.asarray(np.round(values / np.where(scale == 0, 1, scale)) * scale, np.float32)


def to_int8_rows(values: Floats) -> Floats:
    """The same along the first axis, where ONNX and torch have a product's outputs."""
    if values.ndim < 2:
        return values
    return np.asarray(np.moveaxis(to_int8(np.moveaxis(values, 0, -1)), -1, 0), np.float32)


ROUNDINGS: dict[str, Callable[[Floats], Floats]] = {
    "fp32": lambda values: values,
    "fp16": to_fp16,
    "bf16": to_bf16,
    "int8": to_int8,
}


def ner() -> None:
    """Entities of tests/ner/gold.txt that LAC finds."""
    from inferq.consumers.ner.engine import NerEngine
    from inferq.consumers.ner.lac import LacBackend
    from tests.ner.gold import TYPES
    from tests.ner.quality import measure

    print("| weights | precision | recall |\n| --- | ---: | ---: |")
    for name, rounded in ROUNDINGS.items():
        backend = LacBackend()
        network = backend._network
        backend._network = replace(
            network,
            embedding=rounded(network.embedding),
            output=rounded(network.output),
            layers=tuple(
                replace(
                    layer,
                    inputs=rounded(layer.inputs),
                    gates=rounded(layer.gates),
                    candidate=rounded(layer.candidate),
                )
                for layer in network.layers
            ),
        )
        found = measure(NerEngine(backend=backend))
        print(f"| {name} | {found.precision(*TYPES):.3f} | {found.recall(*TYPES):.3f} |", flush=True)
    print("\n| a product of (64, 128) and (128, 256) in NumPy | µs |\n| --- | ---: |")
    for kind in (np.float32, np.float16):
        left, right = np.ones((64, 128), kind), np.ones((128, 256), kind)
        print(f"| {np.dtype(kind).name} | {1e6 * _best(lambda a=left, b=right: a @ b):.0f} |")  # type: ignore[misc]


def ocr() -> None:
    """Lines that RapidOCR reads of pages that tests/ocr/quality.py draws, and of the examples' pages."""
    import onnx
    from onnx import numpy_helper
    from onnxruntime import InferenceSession, SessionOptions
    from PIL import Image

    from benchmarks.engines import PAGES
    from inferq.consumers.ocr.layout import reading_order
    from inferq.consumers.ocr.rapid import RapidBackend
    from tests.ocr import quality

    weights = Path(__import__("rapidocr").__file__).parent / "models"
    files = {
        "text_det": "PP-OCRv6_det_small.onnx",
        "text_cls": "ch_ppocr_mobile_v2.0_cls_mobile.onnx",
        "text_rec": "PP-OCRv6_rec_small.onnx",
    }
    rows = {
        "lines of the two pages in `examples/pages`": None,
        "lines of 90 characters": lambda read: quality.long_lines(read, 90),
        "lines of small print": quality.small_photo,
    }
    backend = RapidBackend(device="cpu", threads=1, detect_megapixels=5.0)

    def read(page: NDArray[np.uint8]) -> list[tuple[str, NDArray[np.float64]]]:
        lines = reading_order([line for line in backend.read([page])[0] if line.score >= 0.5])
        return [(line.text, np.array(line.box)) for line in lines]

    print(f"| weights | {' | '.join(rows)} | mean score |\n| --- |{' ---: |' * (len(rows) + 1)}")
    for name, rounded in (ROUNDINGS | {"int8": to_int8_rows}).items():
        for part, file in files.items():
            model = onnx.load(weights / file)
            for tensor in model.graph.initializer:
                if tensor.data_type == onnx.TensorProto.FLOAT:
                    values = rounded(np.array(numpy_helper.to_array(tensor)))
                    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
            options = SessionOptions()
            options.intra_op_num_threads, options.log_severity_level = 1, 4
            getattr(backend._ocr, part).session.session = InferenceSession(model.SerializeToString(), options)
        cells = []
        scores: list[float] = []
        for count in rows.values():
            if count is None:
                right = total = 0
                for path in PAGES:
                    page = np.array(Image.open(path).convert("RGB"))
                    expected = path.with_suffix(".txt").read_text("utf-8").splitlines()
                    lines = backend.read([page])[0]
                    scores += [line.score for line in lines]
                    right += len({line.text for line in lines} & set(expected))
                    total += len(expected)
            else:
                right, total = count(read)
            cells.append(f"{right} of {total}")
        print(f"| {name} | {' | '.join(cells)} | {np.mean(scores):.4f} |", flush=True)


def acestep() -> None:
    """The sound of ACE-Step's pipeline with tiny random weights, against that of fp32 with the same seed."""
    import torch

    from inferq.consumers.acestep import AceStepTask
    from inferq.consumers.acestep.pipeline import DiffusersBackend
    from inferq.consumers.engine import Context, Precision
    from tests.acestep.tiny import make_weights

    context = Context(Path(), {}, report=lambda *_: None, abort_requested=lambda: False)

    def made(backend: DiffusersBackend, seed: int) -> NDArray[np.float64]:
        task = AceStepTask(task_id="a", task_type="acestep", prompt="calm piano and strings", duration=5.0)
        return np.concatenate(list(backend.compose([task], [seed], [context])[0])).astype(np.float64)

    def ratio(sound: NDArray[np.float64], exact: NDArray[np.float64]) -> float:
        """Signal to error in dB."""
        return float(10 * np.log10((exact**2).sum() / max(((sound - exact) ** 2).sum(), 1e-30)))

    with tempfile.TemporaryDirectory() as folder:
        weights = make_weights(Path(folder) / "tiny", turbo=True)

        def load(precision: Precision) -> DiffusersBackend:
            return DiffusersBackend(model_dir=weights, device="cpu", precision=precision, cpu_offload=False)

        exact = [made(load("fp32"), seed) for seed in range(5)]
        print("| computed in | signal to error, dB (5 seeds: median, worst) |\n| --- | ---: |")
        rows: list[tuple[str, DiffusersBackend]] = [
            ("bf16", load("bf16")),
            ("fp16", load("fp16")),
            ("fp32, weights rounded to int8", load("fp32")),
        ]
        for part in ("transformer", "text_encoder", "condition_encoder"):
            for layer in getattr(rows[2][1]._pipeline, part).modules():
                if isinstance(layer, torch.nn.Linear):
                    layer.weight.data = torch.from_numpy(to_int8_rows(layer.weight.detach().numpy()))
        for name, backend in rows:
            ratios = sorted(ratio(made(backend, seed), sound) for seed, sound in enumerate(exact))
            print(f"| {name} | {ratios[len(ratios) // 2]:.1f}, {ratios[0]:.1f} |", flush=True)


def _best(work: Callable[[], Any], rounds: int = 50) -> float:
    best = float("inf")
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - began)
    return best


PARTS = {"ner": ner, "ocr": ocr, "acestep": acestep}

if __name__ == "__main__":
    for part in sys.argv[1:] or PARTS:
        PARTS[part]()
