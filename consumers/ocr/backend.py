"""The protocol that OCR libraries implement here, and the geometry that they share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from inferq.consumers.media.pictures import RgbImage
from inferq.consumers.ocr import Box, Line
from inferq.schemas import EngineInfo, TransientFailure

RgbPage = RgbImage
"""An upright page."""

TALL = 1.5
"""The ratio of height to width from which PP-OCR treats a box as a vertical line."""

_MARGIN = 16
"""The border added to a page, in pixels: detectors miss text that touches the edge."""
_SMALL_PAGE = 736
"""The shorter side in pixels up to which a page is enlarged, as in RapidOCR."""
_SMALL_PAGE_LONGER = 1600
"""The same for the longer side: detectors split the long lines of an enlarged strip."""
_MOST_ENLARGED = 2.5
_CUBIC = 2
"""The pixels that cubic interpolation reads beyond a box."""
_LONGEST_CUTOUT = 32_000
_SHORTEST_SIDE = 320
"""Pages are padded to at least this many pixels a side: detectors find nothing on smaller ones."""


_OUT_OF_MEMORY = (
    "out of memory",
    "failed to allocate memory",
    "is smaller than requested bytes",
    "resourceexhausted",
    "alloc_failed",
)

GPU_BATCH = 8
"""The most pages that a backend on a GPU reads together. A CPU reads them no faster: see RapidBackend."""


class Backend(Protocol):
    """An OCR library with its models loaded."""

    info: EngineInfo
    batch_size: int
    """The most pages that `read` takes; 1 if it reads several no faster than one after another."""

    def read(self, pages: Sequence[RgbPage]) -> list[list[Line]]:
        """The lines on each page, in any order; boxes in pixels of the page.

        Raises inferq.schemas.TransientFailure (`out_of_memory`) if the GPU has too little free memory now.
        """


def detection_scale(height: int, width: int, megapixels: float) -> float:
    """The factor by which a page is scaled before detection.

    A small page is enlarged, because detectors miss small print. A large one is shrunk to `megapixels`.
    """
    shorter, longer = sorted((height, width))
    enlarged = max(1.0, min(_MOST_ENLARGED, _SMALL_PAGE / shorter, _SMALL_PAGE_LONGER / longer))
    return min(enlarged, float(np.sqrt(megapixels * 1e6 / (height * width))))


def pad(page: RgbPage) -> tuple[RgbPage, int, int]:
    """The page with a border in the colour of its edges, and the border's left and top width in pixels."""
    height, width = page.shape[:2]
    across = max(_MARGIN, -(-(_SHORTEST_SIDE - width) // 2))
    down = max(_MARGIN, -(-(_SHORTEST_SIDE - height) // 2))
    border = np.concatenate([page[0], page[-1], page[:, 0], page[:, -1]])
    colour = [float(value) for value in np.median(border, axis=0)]
    padded = cv2.copyMakeBorder(page, down, down, across, across, cv2.BORDER_CONSTANT, value=colour)
    return np.asarray(padded, np.uint8), across, down


def cut(page: RgbPage, corners: NDArray[np.float32]) -> RgbPage:
    """The straightened cutout within `corners` (`(4, 2)`, clockwise), which start at its top left.

    OpenCV's warpPerspective accepts at most 32,766 pixels a side. So it gets the part of the page around the
    box, and a longer part is shrunk.
    """
    low = np.maximum(np.floor(corners.min(axis=0)).astype(int) - _CUBIC, 0)
    high = np.ceil(corners.max(axis=0)).astype(int) + _CUBIC + 1
    page, corners = page[low[1] : high[1], low[0] : high[0]], corners - low.astype(np.float32)
    if (longest := max(page.shape[:2])) > _LONGEST_CUTOUT:
        shrunk = _LONGEST_CUTOUT / longest
        page = np.asarray(
            cv2.resize(page, None, fx=shrunk, fy=shrunk, interpolation=cv2.INTER_AREA), np.uint8
        )
        corners = corners * np.float32(shrunk)
    top, right, bottom, left = (float(np.linalg.norm(corners[i] - corners[(i + 1) % 4])) for i in range(4))
    width, height = max(1, round(max(top, bottom))), max(1, round(max(left, right)))
    flat = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float32)
    transform = cv2.getPerspectiveTransform(corners.astype(np.float32), flat)
    line = cv2.warpPerspective(
        page, transform, (width, height), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE
    )
    return np.asarray(line, np.uint8)


def turn(corners: NDArray[np.float32], quarters: int) -> NDArray[np.float32]:
    """The same corners, starting `quarters` corners later, clockwise."""
    return np.roll(corners, -quarters, axis=0)


def as_box(corners: Sequence[Sequence[float]] | NDArray[np.float32], height: int, width: int) -> Box:
    """Corners for the output: clipped to the page, rounded to a tenth of a pixel."""
    points = [
        (round(min(max(float(x), 0.0), width), 1), round(min(max(float(y), 0.0), height), 1))
        for x, y in corners
    ]
    return (points[0], points[1], points[2], points[3])


def ratio(corners: NDArray[np.float32]) -> float:
    """The ratio of a box's height to its width."""
    across = float(np.linalg.norm(corners[0] - corners[1]) + np.linalg.norm(corners[2] - corners[3]))
    down = float(np.linalg.norm(corners[1] - corners[2]) + np.linalg.norm(corners[3] - corners[0]))
    return down / max(across, 1e-6)


def is_tall(corners: NDArray[np.float32]) -> bool:
    """Whether a box counts as a vertical line."""
    return ratio(corners) >= TALL


def bgr(image: RgbPage) -> RgbPage:
    """The image in OpenCV's channel order, which both libraries expect."""
    return np.ascontiguousarray(image[:, :, ::-1])


def gpu_number(device: str) -> int:
    """The number of the GPU that a device setting (`gpu`, `cuda`, `cuda:N`) names."""
    return int(device.partition(":")[2] or 0)


def out_of_memory(error: BaseException, pages: Sequence[RgbPage]) -> TransientFailure | None:
    """The failure to raise if a library's error on pages says that the GPU ran out of memory; else None."""
    height, width = max((page.shape[:2] for page in pages), key=math.prod)
    what = "a page" if len(pages) == 1 else f"{len(pages)} pages, the largest"
    cause: BaseException | None = error
    while cause is not None:
        said = f"{type(cause).__name__} {cause}".lower()
        if any(sign in said for sign in _OUT_OF_MEMORY):
            return TransientFailure(
                f"the GPU has too little free memory for {what} of {width}×{height} pixels",
                code="out_of_memory",
            )
        cause = cause.__cause__
    return None
