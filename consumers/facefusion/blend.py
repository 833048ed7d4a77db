"""Blends a warped face into a picture: it matches the picture's light and fades at its edge."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from inferq.consumers.facefusion.landmarks import Points
from inferq.consumers.media.pictures import RgbImage

OUTLINE = (
    *(151, 337, 299, 333, 298, 301, 389, 356, 454, 323, 361, 288, 397, 365, 379, 378, 400, 377),
    *(152, 148, 176, 149, 150, 136, 172, 58, 132, 93, 234, 127, 162, 71, 68, 104, 69, 108),
)
"""The landmarks around the part of a face that is copied: chin, cheeks and half the brow, no fringe."""

_LIGHT = 0.18
"""The scale of light and shade, as a fraction of the face's size. Finer structure is the face's detail."""
_EDGE = 0.12
"""The width of the fade at the face's edge, as a fraction of the face's size."""
_LIPS = 0.01
"""The same around an open mouth; smaller, because lips are narrow."""
_LEAST_CONTRAST, _MOST_CONTRAST = np.array([0.6, 0.0, 0.0], np.float32), 1.2
"""The bounds of the factor on the face's detail, for L, a and b: on a grey target its colours vanish."""


def blend(
    face: RgbImage, onto: RgbImage, points: Points, covered: NDArray[np.bool_], size: float
) -> tuple[RgbImage, NDArray[np.float32]]:
    """`face` in the light of `onto`, and its opacity at each pixel, from 0 to 1.

    Both images are `(height, width, 3)`. The face has pixels at `covered`, and is visible within the outline
    of `points`. `size` is its size in pixels. Its coarse Lab colours are replaced by those of `onto`, which
    carry light, shade and complexion; its detail stays. The result is never brighter than the target, while
    seamless cloning overexposes bright targets.
    """
    relit = _relit(face, onto, covered.astype(np.float32), max(_LIGHT * size, 1.0))
    return relit, _fade(points, covered, size)


def _fade(points: Points, covered: NDArray[np.bool_], size: float) -> NDArray[np.float32]:
    """The opacity of the face at each pixel, from 0 to 1."""
    inside = np.zeros(covered.shape, np.uint8)
    cv2.fillPoly(inside, [np.round(points[list(OUTLINE), :2]).astype(np.int32)], [1])
    fade = cv2.distanceTransform(inside, cv2.DIST_L2, 5) / max(_EDGE * size, 1.0)
    fade = np.clip(fade, 0, 1)
    fade = fade * fade * (3 - 2 * fade)
    mouth = cv2.GaussianBlur(covered.astype(np.float32), (0, 0), max(_LIPS * size, 0.5))
    return np.asarray(fade * np.where(covered, np.clip(2 * mouth - 1, 0, 1), 0), np.float32)


def _relit(face: RgbImage, onto: RgbImage, weight: NDArray[np.float32], sigma: float) -> RgbImage:
    own = cv2.cvtColor(face.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    beneath = cv2.cvtColor(onto.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    total = np.maximum(_coarse(weight, sigma), 1e-3)[:, :, None]
    own_light = _coarse(own * weight[:, :, None], sigma) / total
    light = _coarse(beneath * weight[:, :, None], sigma) / total
    seen = weight > 0
    # Black parts of the face stay black, independent of the complexion around them.
    dim = np.ones_like(own)
    dim[:, :, 1:] = np.clip(own[:, :, :1] / np.maximum(own_light[:, :, :1], 1.0), 0, 1)
    detail = own - own_light * dim
    contrast = np.std((beneath - light)[seen], axis=0) / np.maximum(np.std(detail[seen], axis=0), 1e-3)
    relit = light * dim + detail * np.clip(contrast, _LEAST_CONTRAST, _MOST_CONTRAST)
    relit[:, :, 0] = _bounded(relit[:, :, 0], beneath[seen, 0])
    pixels = cv2.cvtColor(relit, cv2.COLOR_LAB2RGB) * 255
    return np.asarray(np.round(np.clip(pixels, 0, 255)), np.uint8)


def _bounded(lightness: NDArray[np.float32], usual: NDArray[np.float32]) -> NDArray[np.float32]:
    """Lightness compressed towards the brightest of `usual`, without exceeding it."""
    knee, most = (float(value) for value in np.percentile(usual, (90, 99.5)))
    room = max(most - knee, 1.0)
    return np.where(lightness > knee, knee + room * np.tanh((lightness - knee) / room), lightness)


def _coarse(values: NDArray[np.float32], sigma: float) -> NDArray[np.float32]:
    """The values blurred by `sigma` pixels. A scaled-down copy is blurred, which loses nothing at this scale."""
    shrink = min(1.0, 6 / sigma)
    height, width = values.shape[:2]
    small = cv2.resize(
        values, (max(1, round(width * shrink)), max(1, round(height * shrink))), interpolation=cv2.INTER_AREA
    )
    blurred = cv2.GaussianBlur(small, (0, 0), sigma * shrink, borderType=cv2.BORDER_REFLECT)
    return np.asarray(cv2.resize(blurred, (width, height), interpolation=cv2.INTER_LINEAR), np.float32)
