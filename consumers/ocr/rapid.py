"""RapidOCR: PP-OCR on onnxruntime, with the weights in its wheel."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Generator, Sequence
from importlib.metadata import version
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from inferq.consumers.ocr import Line
from inferq.consumers.ocr.backend import (
    GPU_BATCH,
    RgbPage,
    as_box,
    bgr,
    cut,
    detection_scale,
    gpu_number,
    out_of_memory,
    pad,
    ratio,
    turn,
)
from inferq.consumers.ocr.direction import (
    Reading,
    best,
    counts,
    is_sideways,
    pieces,
    quarters_along,
    sample,
    settled,
    upside_down,
    ways,
)
from inferq.consumers.ocr.long_lines import joined, parts
from inferq.engine import onnxruntime_cuda_options
from inferq.schemas import EngineInfo, InstallationError

_CERTAIN = 0.9
"""The minimum score at which the orientation classifier's answer counts."""


_MODELS = 3
"""Detection, orientation, recognition: each has a session of onnxruntime."""

_Lines = list[tuple[NDArray[np.float32], Reading]]
"""Lines with their corners in the direction of their text."""

_Reader = Generator[list[RgbPage], list[Reading], _Lines]
"""Reads a page: yields cutouts of it, is sent their readings, and returns the page's lines."""


class RapidBackend:
    """PP-OCRv6 small: detection, orientation, recognition."""

    def __init__(
        self,
        *,
        device: str,
        threads: int,
        detect_megapixels: float,
        gpu_memory_fraction: float | None = None,
    ) -> None:
        """Loads the models onto `device` (`cpu`, `gpu`, `cuda`, `cuda:N`).

        `gpu_memory_fraction` is the most of the GPU's memory that onnxruntime may allocate. Raises InstallationError
        if RapidOCR, its weights or the device is missing.
        """
        self._detect_megapixels = detect_megapixels
        on_gpu = device != "cpu"
        # A batch pads its lines to the longest one. On a CPU that costs more than batching saves (0.59 s
        # a page with batches, 0.50 s without); a GPU needs the batch. Nor do the lines of several pages help a CPU,
        # though they are more alike: 1.42 s of CPU time a page for 8 pages in batches of 6, 1.28 s one by one.
        self.batch_size = GPU_BATCH if on_gpu else 1
        parameters: dict[str, Any] = {
            "Global.log_level": "critical",
            "Global.use_preprocess_img": False,
            # This backend scales pages itself: the library would shrink the page for recognition too.
            "Det.limit_type": "max",
            "Det.limit_side_len": 1_000_000,
            # The library reads the lowest 1,000 boxes of a page and omits the others without an error.
            "Det.max_candidates": 10_000_000,
            "Rec.rec_batch_num": 16 if on_gpu else 1,
            "EngineConfig.onnxruntime.intra_op_num_threads": min(threads, os.cpu_count() or 1),
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
        }
        if on_gpu:
            parameters["EngineConfig.onnxruntime.use_cuda"] = True
            options = onnxruntime_cuda_options(gpu_number(device), gpu_memory_fraction, sessions=_MODELS)
            options["cudnn_conv_algo_search"] = "HEURISTIC"
            for name, value in options.items():
                parameters[f"EngineConfig.onnxruntime.cuda_ep_cfg.{name}"] = value
        self._ocr = _load(parameters)
        providers = self._ocr.text_det.session.session.get_providers()
        if on_gpu and "CUDAExecutionProvider" not in providers:
            raise InstallationError(
                f"INFERQ_DEVICE={device}, but onnxruntime could not start CUDA (it offers "
                f"{', '.join(providers)}): check the driver, CUDA and cuDNN, or set INFERQ_DEVICE=cpu",
                code="device_unavailable",
            )
        self.info = EngineInfo(
            name="rapidocr",
            version=version("rapidocr"),
            model="PP-OCRv6_small",
            device=device,
            precision="fp32",
        )

    def read(self, pages: Sequence[RgbPage]) -> list[list[Line]]:
        """The lines on each page, in any of the four orientations."""
        try:
            found = self._recognize(pages, [self._detect(page) for page in pages])
        except Exception as error:
            failure = out_of_memory(error, pages)
            if failure is None:
                raise
            raise failure from error
        return [
            [
                Line(text=reading.text, score=reading.score, box=as_box(corners, *page.shape[:2]))
                for corners, reading in lines
                if reading.text.strip()
            ]
            for page, lines in zip(pages, found, strict=True)
        ]

    def _detect(self, page: RgbPage) -> NDArray[np.float32]:
        """The lines' corners, `(n, 4, 2)`, clockwise from the top left, in pixels of the page."""
        scale = detection_scale(page.shape[0], page.shape[1], self._detect_megapixels)
        if scale != 1:
            filtered = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
            page = np.asarray(cv2.resize(page, None, fx=scale, fy=scale, interpolation=filtered), np.uint8)
        padded, left, top = pad(page)
        boxes = self._ocr.text_det(bgr(padded)).boxes
        if boxes is None:
            return np.empty((0, 4, 2), np.float32)
        found = (np.asarray(boxes, np.float32) - np.array([left, top], np.float32)) / np.float32(scale)
        return np.clip(found, 0, np.array([page.shape[1], page.shape[0]], np.float32) / np.float32(scale))

    def _recognize(self, pages: Sequence[RgbPage], boxes: Sequence[NDArray[np.float32]]) -> list[_Lines]:
        """The lines of each page. All pages' lines are classified together, and read together."""
        ratios = [[ratio(corners) for corners in found] for found in boxes]
        along = []
        for shapes in ratios:
            sideways = is_sideways(shapes)
            along.append([quarters_along(shape, sideways) for shape in shapes])
        votes = iter(
            self._votes(
                [
                    cut(page, turn(corners, way))
                    for page, found, ways_along in zip(pages, boxes, along, strict=True)
                    for corners, way in zip(found, ways_along, strict=True)
                ]
            )
        )
        readers = [
            self._read_page(page, found, shapes, ways_along, [next(votes) for _ in found])
            for page, found, shapes, ways_along in zip(pages, boxes, ratios, along, strict=True)
        ]
        return _in_step(readers, self._read_lines)

    @staticmethod
    def _read_page(
        page: RgbPage,
        boxes: NDArray[np.float32],
        ratios: Sequence[float],
        along: Sequence[int],
        votes: Sequence[int],
    ) -> _Reader:
        """Choose the direction of each line by the classifier's votes, and where they do not settle it by reading."""
        sideways = is_sideways(ratios)
        readings: dict[tuple[int, int], Reading] = {}

        def read(
            wanted: Sequence[tuple[int, int]],
        ) -> Generator[list[RgbPage], list[Reading], list[Reading]]:
            missing = [key for key in dict.fromkeys(wanted) if key not in readings]
            found = yield [cut(page, turn(boxes[index], quarters)) for index, quarters in missing]
            readings.update(zip(missing, found, strict=True))
            return [readings[key] for key in wanted]

        over = [False, False]
        for way in (0, 1):
            group = [index for index, own in enumerate(along) if own == way]
            telling = [votes[index] for index in group if counts(ratios[index])]
            if group and settled(telling) is None:
                lengths = [float(np.linalg.norm(boxes[index][0] - boxes[index][2])) for index in group]
                chosen = [group[position] for position in sample(lengths)]
                as_found = yield from read([(index, way) for index in chosen])
                turned = yield from read([(index, way + 2) for index in chosen])
                over[way] = upside_down(telling, as_found, turned)
        candidates = [
            ways(shape, sideways=sideways, over=over, vote=vote)
            for shape, vote in zip(ratios, votes, strict=True)
        ]
        yield from read([(index, way.quarters) for index, found in enumerate(candidates) for way in found])
        lines = []
        for index, found in enumerate(candidates):
            kept = found[best([(way, readings[index, way.quarters]) for way in found])].quarters
            lines.append((turn(boxes[index], kept), readings[index, kept]))
        return lines

    def _votes(self, lines: Sequence[RgbPage]) -> list[int]:
        """The classifier's votes: by how many of its pieces each line is upside down, negative if upright."""
        parts = [(number, piece) for number, line in enumerate(lines) for piece in pieces(line)]
        votes = [0] * len(lines)
        if parts:
            answers = self._ocr.text_cls([bgr(piece) for _, piece in parts]).cls_res
            for (number, _), (label, score) in zip(parts, answers, strict=True):
                if score > _CERTAIN:
                    votes[number] += 1 if label == "180" else -1
        return votes

    def _read_lines(self, lines: Sequence[RgbPage]) -> list[Reading]:
        if not lines:
            return []
        from rapidocr.ch_ppocr_rec import TextRecInput

        cutouts = [parts(line) for line in lines]
        pictures = [bgr(part.picture) for found in cutouts for part in found]
        result = self._ocr.text_rec(TextRecInput(img=pictures))
        readings = iter(
            [
                Reading(text, min(max(float(score), 0.0), 1.0))
                for text, score in zip(result.txts, result.scores, strict=True)
            ]
        )
        return [joined([(part, next(readings)) for part in found]) for found in cutouts]


def _in_step(readers: Sequence[_Reader], read: Callable[[list[RgbPage]], list[Reading]]) -> list[_Lines]:
    """Run the readers side by side: the cutouts that they yield in one step are read together."""
    lines: list[_Lines] = [[] for _ in readers]
    wanted = {number: next(reader) for number, reader in enumerate(readers)}
    while wanted:
        readings = iter(read([cutout for cutouts in wanted.values() for cutout in cutouts]))
        following = {}
        for number, cutouts in wanted.items():
            try:
                following[number] = readers[number].send([next(readings) for _ in cutouts])
            except StopIteration as ended:
                lines[number] = ended.value
        wanted = following
    return lines


def _load(parameters: dict[str, Any]) -> Any:
    try:
        from rapidocr import RapidOCR
    except ImportError as error:
        raise InstallationError(
            f"RapidOCR cannot be imported ({error}): pip install 'inferq[ocr]'", code="engine_not_installed"
        ) from error
    logging.getLogger("RapidOCR").setLevel(logging.CRITICAL)
    try:
        ocr = RapidOCR(params=parameters)
        # RapidOCR loads models on first use: detection with the first call, the other two with the second.
        blank = np.full((64, 320, 3), 255, np.uint8)
        ocr(blank, use_det=True, use_cls=False, use_rec=False)
        ocr(blank, use_det=False, use_cls=True, use_rec=True)
    except Exception as error:
        raise InstallationError(
            f"RapidOCR's models cannot be loaded: {error}", code="engine_not_loadable"
        ) from error
    return ocr
