"""Fits a warped face into its new surroundings: in their light, and without an edge."""

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
"""The landmarks around what is taken over of a face: chin, cheeks and half the brow, without a fringe."""

_LIGHT = 0.18
"""How coarse light and shade are, as a part of the face's size: what is finer counts as the face's own."""
_EDGE = 0.12
"""Over what part of the face's size it fades into its surroundings."""
_LIPS = 0.01
"""The same around an open mouth, whose lips are narrow."""
_LEAST_CONTRAST, _MOST_CONTRAST = np.array([0.6, 0.0, 0.0], np.float32), 1.2
"""How much weaker and stronger the face's details may become: its colours vanish on a grey target."""


def blend(
    face: RgbImage, onto: RgbImage, points: Points, covered: NDArray[np.bool_], size: float
) -> tuple[RgbImage, NDArray[np.float32]]:
    """`face` in the light of `onto`, and how much of it is to be seen at each pixel, from 0 to 1.

    Both are `(height, width, 3)`; the face is there where it is `covered`, and seen within the outline of
    `points`. `size` is its size in pixels. It takes over the light, shade and complexion of what it replaces:
    its coarse Lab colours give way to those beneath, its details stay. Where seamless cloning burns out a
    bright target, this is no brighter than the target was.
    """
    relit = _relit(face, onto, covered.astype(np.float32), max(_LIGHT * size, 1.0))
    return relit, _fade(points, covered, size)


def _fade(points: Points, covered: NDArray[np.bool_], size: float) -> NDArray[np.float32]:
    """How much of the face is seen at each pixel, from 0 to 1."""
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
    # What is black on the face stays black, whatever the complexion around it.
    dim = np.ones_like(own)
    dim[:, :, 1:] = np.clip(own[:, :, :1] / np.maximum(own_light[:, :, :1], 1.0), 0, 1)
    detail = own - own_light * dim
    contrast = np.std((beneath - light)[seen], axis=0) / np.maximum(np.std(detail[seen], axis=0), 1e-3)
    relit = light * dim + detail * np.clip(contrast, _LEAST_CONTRAST, _MOST_CONTRAST)
    relit[:, :, 0] = _bounded(relit[:, :, 0], beneath[seen, 0])
    pixels = cv2.cvtColor(relit, cv2.COLOR_LAB2RGB) * 255
    return np.asarray(np.round(np.clip(pixels, 0, 255)), np.uint8)


def _bounded(lightness: NDArray[np.float32], usual: NDArray[np.float32]) -> NDArray[np.float32]:
    """Lightness that approaches the brightest of what was there, and does not exceed it."""
    knee, most = (float(value) for value in np.percentile(usual, (90, 99.5)))
    room = max(most - knee, 1.0)
    return np.where(lightness > knee, knee + room * np.tanh((lightness - knee) / room), lightness)


def _coarse(values: NDArray[np.float32], sigma: float) -> NDArray[np.float32]:
    """Blurred, by way of a small copy: at `sigma` pixels nothing of it is lost."""
    shrink = min(1.0, 6 / sigma)
    height, width = values.shape[:2]
    small = cv2.resize(
        values, (max(1, round(width * shrink)), max(1, round(height * shrink))), interpolation=cv2.INTER_AREA
    )
    blurred = cv2.GaussianBlur(small, (0, 0), sigma * shrink, borderType=cv2.BORDER_REFLECT)
    return np.asarray(cv2.resize(blurred, (width, height), interpolation=cv2.INTER_LINEAR), np.float32)
