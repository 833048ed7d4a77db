"""Warps one face into the shape of another, triangle by triangle of the landmarks' mesh."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import combinations

import cv2
import numpy as np
from numpy.typing import NDArray

from inferq.consumers.facefusion.landmarks import Points
from inferq.consumers.media.pictures import RgbImage

Triangles = NDArray[np.int32]

_SUBPIXEL_BITS = 4
"""The number of fractional bits of the fixed-point coordinates in which OpenCV draws polygons."""


def triangulate(edges: Iterable[tuple[int, int]]) -> Triangles:
    """The triangles of a face's mesh with these edges, `(n, 3) int32`.

    mediapipe publishes its mesh as edges, with holes at the eyes and the mouth. This fills the eyes. The mouth
    stays open: if the source's mouth is closed, it has no pixels for the inside of an open one.
    """
    neighbours: dict[int, set[int]] = {}
    for one, other in edges:
        neighbours.setdefault(one, set()).add(other)
        neighbours.setdefault(other, set()).add(one)
    corners = {
        tuple(sorted((a, b, c)))
        for a in neighbours
        for b in neighbours[a]
        for c in neighbours[a] & neighbours[b]
    }
    # The three neighbours of a vertex of degree three form a triangle too; the inner triangles cover it.
    for ring in neighbours.values():
        if len(ring) == 3:
            corners.discard(tuple(sorted(ring)))
    uses = Counter(edge for triangle in corners for edge in combinations(triangle, 2))
    borders = _loops(edge for edge, count in uses.items() if count == 1)
    # The outer border is the longest loop, the mouth the second longest.
    for hole in sorted(borders, key=len)[:-2]:
        corners.update((hole[0], hole[i], hole[i + 1]) for i in range(1, len(hole) - 1))
    return np.array(sorted(corners), np.int32)


def warp(
    source: RgbImage,
    source_points: Points,
    target_points: Points,
    triangles: Triangles,
    size: tuple[int, int],
) -> tuple[RgbImage, NDArray[np.bool_]]:
    """The source's face in the shape of the target's, on a canvas of `size` (width, height).

    Points are `(n, 3)` in pixels of the source and of the canvas. If the mesh folds over itself, the nearer
    part is visible. Gives the canvas and a mask of the pixels that the face covers.
    """
    source, source_points = _cut_and_shrink(source, source_points, target_points)
    width, height = size
    nearest_last = np.argsort(-target_points[triangles, 2].mean(axis=1), kind="stable")
    drawn = np.full((height, width), -1, np.int32)
    fixed = np.round(target_points[:, :2] * 2**_SUBPIXEL_BITS).astype(np.int32)
    for number in nearest_last:
        cv2.fillConvexPoly(
            drawn, fixed[triangles[number]], [int(number)], lineType=cv2.LINE_8, shift=_SUBPIXEL_BITS
        )
    rows, columns = np.nonzero(drawn >= 0)
    where = np.full((height, width, 2), -1, np.float32)
    where[rows, columns] = _map_positions(
        np.stack([columns, rows], axis=1).astype(np.float32),
        drawn[rows, columns],
        target_points[:, :2][triangles],
        source_points[:, :2][triangles],
    )
    canvas = cv2.remap(
        source, where[:, :, 0], where[:, :, 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )
    return np.asarray(canvas, np.uint8), drawn >= 0


def _map_positions(
    places: NDArray[np.float32], within: NDArray[np.int32], before: Points, after: Points
) -> NDArray[np.float32]:
    """Map positions `(m, 2)` within the numbered triangles `before` to the triangles `after`.

    A triangle's border pixels lie half outside it. They are clamped to its edge, because a thin triangle would
    map them far away.
    """
    corners = np.concatenate([before, np.ones_like(before[:, :, :1])], axis=2).astype(np.float64)
    # A degenerate triangle has no inverse; the pseudo-inverse gives a point within it.
    weigh = np.linalg.pinv(np.swapaxes(corners, 1, 2)).astype(np.float32)[within]
    shares = weigh[:, :, 0] * places[:, :1] + weigh[:, :, 1] * places[:, 1:] + weigh[:, :, 2]
    shares = np.clip(shares, 0, 1)
    shares /= np.maximum(shares.sum(axis=1, keepdims=True), 1e-6)
    return np.asarray(np.einsum("nk,nkd->nd", shares, after[within]), np.float32)


def _cut_and_shrink(
    source: RgbImage, source_points: Points, target_points: Points
) -> tuple[RgbImage, Points]:
    """The face cut from the source and scaled down to about its final size, to avoid aliasing."""
    low, high = source_points[:, :2].min(axis=0), source_points[:, :2].max(axis=0)
    # A face may extend beyond the picture's edge.
    last = np.array(source.shape[1::-1]) - 1
    left, top = np.clip(low.astype(int) - 2, 0, last)
    right, bottom = np.clip(high.astype(int) + 2, 0, last)
    cut = source[top : bottom + 1, left : right + 1]
    wanted = float(np.ptp(target_points[:, :2], axis=0).max())
    factor = min(1.0, wanted / max(float((high - low).max()), 1.0))
    moved = source_points - np.array([left, top, 0], np.float32)
    if factor >= 0.75:
        return cut, moved
    width, height = (max(1, round(side * factor)) for side in cut.shape[1::-1])
    shrunk = cv2.resize(cut, (width, height), interpolation=cv2.INTER_AREA)
    ratio = np.array([width / cut.shape[1], height / cut.shape[0], 1.0], np.float32)
    return np.asarray(shrunk, np.uint8), moved * ratio


def _loops(edges: Iterable[tuple[int, int]]) -> list[list[int]]:
    """The closed loops that these edges form, each as its vertices in order from the lowest number on."""
    following: dict[int, list[int]] = {}
    for one, other in edges:
        following.setdefault(one, []).append(other)
        following.setdefault(other, []).append(one)
    loops = []
    left = set(following)
    while left:
        loop = [min(left)]
        while True:
            left.discard(loop[-1])
            ahead = [vertex for vertex in sorted(following[loop[-1]]) if vertex in left]
            if not ahead:
                break
            loop.append(ahead[0])
        loops.append(loop)
    return loops
