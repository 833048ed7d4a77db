"""PaddleOCR 3: on paddlepaddle (CPU or GPU), or on onnxruntime without it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from inferq.consumers.ocr import Line
from inferq.consumers.ocr.backend import (
    GPU_BATCH,
    RgbPage,
    as_box,
    bgr,
    detection_scale,
    gpu_number,
    is_tall,
    out_of_memory,
    pad,
    turn,
)
from inferq.engine import Precision, limit_paddle_memory, onnxruntime_cuda_options
from inferq.schemas import EngineInfo, InstallationError

_ROLES = {"_det": "text_detection", "_rec": "text_recognition", "_textline_ori": "textline_orientation"}
"""Ending of a PaddleOCR model's name → name of its role in PaddleOCR's parameters."""


@dataclass(frozen=True)
class _Model:
    name: str
    folder: Path


class PaddleBackend:
    """Detection and recognition, and line orientation if its model is installed."""

    def __init__(
        self,
        *,
        device: str,
        computes_with: Literal["cpu", "gpu", "onnxruntime"] | None,
        threads: int,
        model_dir: Path | None,
        detect_megapixels: float,
        precision: Precision = "fp32",
        gpu_memory_fraction: float | None = None,
    ) -> None:
        """Loads the models.

        `device` is `cpu`, `gpu`, `cuda` or `cuda:N`. `computes_with` overrides it (`cpu`, `gpu`) or selects
        onnxruntime on that device. `precision` is one of `offered` for them; `gpu_memory_fraction` is the most of
        the GPU's memory that the framework may allocate. Raises InstallationError if a library, a model or the
        device is missing.
        """
        self._detect_megapixels = detect_megapixels
        on_onnxruntime = computes_with == "onnxruntime"
        on_gpu = _on_gpu(device, computes_with)
        place = f"gpu:{gpu_number(device)}" if on_gpu else "cpu"
        if not on_onnxruntime:
            limit_paddle_memory(gpu_number(device) if on_gpu else None, gpu_memory_fraction)
        self.batch_size = GPU_BATCH if on_gpu else 1
        models = _find_models(model_dir) if model_dir is not None else {}
        if models:
            # All models are in a folder, so PaddleOCR need not check its download hosts.
            os.environ.setdefault("PADDLE_PDX_DISABLE_MODEL_SOURCE_CHECK", "True")
        self._ocr = _load(
            {
                **{f"{role}_model_name": model.name for role, model in models.items()},
                **{f"{role}_model_dir": str(model.folder) for role, model in models.items()},
                "use_doc_orientation_classify": False,
                "use_doc_unwarping": False,
                "use_textline_orientation": not models or "textline_orientation" in models,
                "text_recognition_batch_size": 16 if on_gpu else 1,
                "device": place,
                **(
                    _onnxruntime(gpu_number(device) if on_gpu else None, gpu_memory_fraction, threads)
                    if on_onnxruntime
                    else _paddle(models, precision, on_gpu=on_gpu, threads=threads)
                ),
            },
            check=lambda: _check_device(place, models, on_onnxruntime=on_onnxruntime),
        )
        self.info = EngineInfo(
            name="paddleocr",
            version=version("paddleocr"),
            model="+".join(models[role].name for role in _ROLES.values() if role in models) or "default",
            device=f"{place} (onnxruntime)" if on_onnxruntime else place,
            precision=precision,
        )

    def read(self, pages: Sequence[RgbPage]) -> list[list[Line]]:
        """The lines on each page."""
        padded = [pad(page) for page in pages]
        images = [bgr(image) for image, _, _ in padded]
        sides = []
        for image in images:
            height, width = image.shape[:2]
            sides.append(
                max(32, round(max(height, width) * detection_scale(height, width, self._detect_megapixels)))
            )
        try:
            if len(pages) == 1:
                found = self._ocr.predict(
                    images[0],
                    text_det_limit_type="max",
                    text_det_limit_side_len=sides[0],
                    text_rec_score_thresh=0.0,
                )
            else:
                found = self._predict_together(images, sides)
        except Exception as error:
            failure = out_of_memory(error, pages)
            if failure is None:
                raise
            raise failure from error
        return [
            _lines(page, one, left, top)
            for page, one, (_, left, top) in zip(pages, found, padded, strict=True)
        ]

    def _predict_together(self, images: Sequence[RgbPage], sides: Sequence[int]) -> list[dict[str, Any]]:
        """PaddleOCR's `predict`, with the lines of all pages recognized together.

        Given several pages, PaddleX's own (3.7) recognizes each page's lines by themselves.
        """
        pipeline = self._ocr.paddlex_pipeline._pipeline
        polygons: list[list[Any]] = []
        lines: list[Any] = []
        for image, side in zip(images, sides, strict=True):
            (detected,) = pipeline.text_det_model([image], **pipeline.get_text_det_params(side, "max"))
            boxes = pipeline._sort_boxes(detected["dt_polys"])
            cutouts = pipeline._crop_by_polys(image, boxes) if len(boxes) else []
            kept = [(box, line) for box, line in zip(boxes, cutouts, strict=True) if line.size]
            polygons.append([box for box, _ in kept])
            lines += [line for _, line in kept]
        flips = [-1] * len(lines)
        if pipeline.use_textline_orientation and lines:
            flips = [int(np.ravel(way["class_ids"])[0]) for way in pipeline.textline_orientation_model(lines)]
            lines = pipeline.rotate_image(lines, flips)
        order = sorted(range(len(lines)), key=lambda index: lines[index].shape[1] / lines[index].shape[0])
        readings: dict[int, Any] = {}
        if order:
            read = pipeline.text_rec_model([lines[index] for index in order], return_word_box=False)
            readings = dict(zip(order, read, strict=True))
        results, start = [], 0
        for found in polygons:
            own = range(start, start + len(found))
            results.append(
                {
                    "rec_polys": found,
                    "rec_texts": [readings[index]["rec_text"] for index in own],
                    "rec_scores": [readings[index]["rec_score"] for index in own],
                    "textline_orientation_angles": flips[own.start : own.stop],
                }
            )
            start = own.stop
        return results


def _lines(page: RgbPage, found: Any, left: int, top: int) -> list[Line]:
    """PaddleOCR's findings on a page with a border, `left` and `top` wide, as lines of the page."""
    polygons = found["rec_polys"]
    # Without its model, all orientations are -1; on an empty page the key is absent.
    flips = list(found.get("textline_orientation_angles", [])) or [-1] * len(polygons)
    lines = []
    for polygon, text, score, flip in zip(
        polygons, found["rec_texts"], found["rec_scores"], flips, strict=True
    ):
        if not text.strip():
            continue
        corners = np.asarray(polygon, np.float32) - np.array([left, top], np.float32)
        # PaddleOCR rotates a tall line to the left, and an upside-down line by half a turn.
        corners = turn(corners, (1 if is_tall(corners) else 0) + (2 if flip == 1 else 0))
        certainty = min(max(float(score), 0.0), 1.0)
        lines.append(Line(text=text, score=certainty, box=as_box(corners, *page.shape[:2])))
    return lines


def _load(parameters: dict[str, Any], *, check: Callable[[], None]) -> Any:
    try:
        from paddleocr import PaddleOCR
    except ImportError as error:
        raise InstallationError(
            f"PaddleOCR cannot be imported ({error}): pip install 'inferq[paddleocr]', or set "
            "INFERQ_OCR_BACKEND=rapidocr",
            code="engine_not_installed",
        ) from error
    logging.getLogger("paddlex").setLevel(logging.WARNING)
    check()
    try:
        ocr = PaddleOCR(**parameters)
        # PaddleX reads the lowest 1,000 boxes of a page, and shrinks pages of more than 4,000 pixels a side for
        # detection, without an error. PaddleOCR has no parameters for these limits.
        pipeline = ocr.paddlex_pipeline._pipeline
        pipeline.text_det_max_side_limit = 1_000_000
        pipeline.text_det_model.post_op.max_candidates = 10_000_000
        return ocr
    except Exception as error:
        raise InstallationError(
            f"PaddleOCR's models cannot be loaded: {error}; set INFERQ_OCR_MODEL_DIR to a folder that has "
            "them",
            code="engine_not_loadable",
        ) from error


def offered(device: str, computes_with: Literal["cpu", "gpu", "onnxruntime"] | None) -> list[Precision]:
    """The precisions that PaddleOCR has there, its own choice first."""
    if computes_with == "onnxruntime":
        return ["fp32"]  # the precision of the weights' files
    if _on_gpu(device, computes_with):
        return ["fp32", "fp16"]
    # On another CPU, oneDNN computes in fp32 without an error.
    return ["fp32", "bf16"] if _has_bf16() else ["fp32"]


def _on_gpu(device: str, computes_with: Literal["cpu", "gpu", "onnxruntime"] | None) -> bool:
    return computes_with == "gpu" or (computes_with != "cpu" and device != "cpu")


def _has_bf16() -> bool:
    """Whether oneDNN computes in bf16 on this CPU: paddle's condition is AVX-512."""
    try:
        return "avx512bw" in Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return False


def _onnxruntime(gpu: int | None, gpu_memory_fraction: float | None, threads: int) -> dict[str, Any]:
    config: dict[str, Any] = {"intra_op_num_threads": threads}
    if gpu is not None and gpu_memory_fraction is not None:
        config["provider_options"] = onnxruntime_cuda_options(gpu, gpu_memory_fraction, sessions=len(_ROLES))
    return {"engine": "onnxruntime", "engine_config": config}


def _paddle(models: dict[str, _Model], precision: Precision, *, on_gpu: bool, threads: int) -> dict[str, Any]:
    if on_gpu and precision == "fp32":
        return {"engine": "paddle"}
    if on_gpu:
        return {"engine": "paddle", "engine_config": {"paddle_static": {"run_mode": f"paddle_{precision}"}}}
    static: dict[str, Any] = {
        "cpu_threads": threads,
        "run_mode": "mkldnn" if precision == "fp32" else f"mkldnn_{precision}",
    }
    if models and all((model.folder / "inference.pdmodel").exists() for model in models.values()):
        # Paddle 3.3 cannot run these older programs on oneDNN through its new program representation
        # (ConvertPirAttribute2RuntimeAttribute is not supported).
        static["enable_new_ir"] = False
    return {"engine": "paddle", "engine_config": {"paddle_static": static}}


def _check_device(place: str, models: dict[str, _Model], *, on_onnxruntime: bool) -> None:
    """Raises InstallationError if a framework or the GPU is missing, before a framework can fall back."""
    on_gpu = place != "cpu"
    number = gpu_number(place)
    if on_onnxruntime:
        _check_onnxruntime(number if on_gpu else None, models)
        return
    try:
        paddle = import_module("paddle")
    except ImportError as error:
        raise InstallationError(
            f"paddlepaddle cannot be imported ({error}): install paddlepaddle or paddlepaddle-gpu, or set "
            "INFERQ_OCR_DEVICE=onnxruntime",
            code="engine_not_installed",
        ) from error
    if on_gpu and not (paddle.device.is_compiled_with_cuda() and paddle.device.cuda.device_count() > number):
        raise InstallationError(
            f"OCR is set to run on {place}, but paddlepaddle {paddle.__version__} finds no such GPU: install "
            "paddlepaddle-gpu and the driver, or set INFERQ_DEVICE=cpu",
            code="device_unavailable",
        )


def _check_onnxruntime(number: int | None, models: dict[str, _Model]) -> None:
    try:
        import onnxruntime
    except ImportError as error:
        raise InstallationError(
            f"onnxruntime cannot be imported ({error}): pip install onnxruntime", code="engine_not_installed"
        ) from error
    if number is None:
        return
    offered = onnxruntime.get_available_providers()
    if "CUDAExecutionProvider" in offered and "text_detection" in models:
        # A provider in this list may still fail to start; onnxruntime then uses the CPU without an error.
        session = onnxruntime.InferenceSession(
            str(models["text_detection"].folder / "inference.onnx"),
            providers=[("CUDAExecutionProvider", {"device_id": number})],
        )
        offered = session.get_providers()
    if "CUDAExecutionProvider" not in offered:
        raise InstallationError(
            f"OCR is set to run on gpu:{number}, but onnxruntime cannot start CUDA (it offers "
            f"{', '.join(offered)}): install onnxruntime-gpu and the driver, or set INFERQ_DEVICE=cpu",
            code="device_unavailable",
        )


def _find_models(folder: Path) -> dict[str, _Model]:
    """The models below a folder, by role. The ending of a model's name gives its role."""
    found: dict[str, _Model] = {}
    for description in sorted(folder.glob("*/inference.yml")):
        name = str(yaml.safe_load(description.read_text(encoding="utf-8"))["Global"]["model_name"])
        for ending, role in _ROLES.items():
            if name.endswith(ending):
                if role in found:
                    raise InstallationError(
                        f"INFERQ_OCR_MODEL_DIR {folder} has two {role} models, {found[role].name} and "
                        f"{name}: remove one",
                        code="bad_model_dir",
                    )
                found[role] = _Model(name, description.parent)
    missing = [role for role in ("text_detection", "text_recognition") if role not in found]
    if missing:
        raise InstallationError(
            f"INFERQ_OCR_MODEL_DIR {folder} has no {' and no '.join(missing)} model: it must hold one folder "
            "for each, with an inference.yml that names it",
            code="bad_model_dir",
        )
    return found
