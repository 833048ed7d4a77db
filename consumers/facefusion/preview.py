"""The preview: swaps faces by their landmarks, without a face-swapping model and without a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version

import cv2
import numpy as np

from inferq.consumers.facefusion import FaceChoice, FoundFace
from inferq.consumers.facefusion.backend import Swap, no_face_found
from inferq.consumers.facefusion.blend import blend
from inferq.consumers.facefusion.landmarks import Face, FaceFinder, mesh_edges
from inferq.consumers.facefusion.warp import triangulate, warp
from inferq.consumers.media.pictures import RgbImage
from inferq.engine import Context
from inferq.schemas import EngineInfo

_MARGIN = 0.1
"""The margin around a face's box that is processed with it, as a fraction of the face's size."""
_LARGEST_PATCH = 512
"""Larger faces are scaled down to this many pixels for warping and blending."""


class PreviewBackend:
    """Warps the source's face into the shape of the target's, and blends it in."""

    preview = True

    def __init__(self) -> None:
        """Raises ImportError if mediapipe is not installed, InstallationError for an unsupported version."""
        self._finder = FaceFinder()
        self._triangles = triangulate(mesh_edges())
        self.info = EngineInfo(
            name="preview",
            version=version("mediapipe"),
            model="mediapipe-face-mesh",
            device="cpu",
            precision="fp32",
        )

    def warm_up(self) -> None:
        """Search a generated picture, warp and blend a generated face: the first use builds tables."""
        sample = np.tile(np.arange(256, dtype=np.uint8)[:, None, None], (1, 256, 3))
        self._finder.find(sample)
        flat = np.random.default_rng(0).uniform(64, 192, (468, 3)).astype(np.float32)
        self._replace(sample, Face(flat, 1.0), sample.copy(), Face(flat, 1.0))

    def close(self) -> None:
        """Release the models."""
        self._finder.close()

    def swap(self, source: RgbImage, target: RgbImage, face: FaceChoice, context: Context) -> Swap:
        """The target, with the selected faces replaced by the source's largest. It changes `target` in place."""
        context.progress(0.1, "searching the source for faces")
        on_source = self._finder.find(source, context.check_abort)
        if not on_source:
            raise no_face_found("source")
        context.progress(0.3, "searching the target for faces")
        on_target = self._finder.find(target, context.check_abort)
        chosen = choose_faces(face, len(on_target))
        for done, number in enumerate(chosen):
            context.check_abort()
            context.progress(0.5 + 0.4 * done / len(chosen), f"face {done + 1} of {len(chosen)}")
            self._replace(source, on_source[0], target, on_target[number])
        return Swap(
            picture=target,
            source_faces=_described(on_source, source),
            target_faces=_described(on_target, target),
            swapped=chosen,
        )

    def _replace(self, source: RgbImage, own: Face, target: RgbImage, other: Face) -> None:
        """Replace one face on the target. It computes and changes only the region of that face."""
        left, top, right, bottom = _region(other, target)
        onto = target[top:bottom, left:right]
        scale = min(1.0, _LARGEST_PATCH / max(onto.shape[:2]))
        if scale < 1:
            small = (max(1, round(onto.shape[1] * scale)), max(1, round(onto.shape[0] * scale)))
            onto = np.asarray(cv2.resize(onto, small, interpolation=cv2.INTER_AREA), np.uint8)
        stretch = np.array(
            [onto.shape[1] / (right - left), onto.shape[0] / (bottom - top), scale], np.float32
        )
        points = (other.points - np.array([left, top, 0], np.float32)) * stretch
        size = float(np.sqrt(other.area)) * scale
        face, covered = warp(source, own.points, points, self._triangles, (onto.shape[1], onto.shape[0]))
        patch, fade = blend(face, onto, points, covered, size)
        _lay(patch, fade, target[top:bottom, left:right])


def choose_faces(face: FaceChoice, count: int) -> tuple[int, ...]:
    """The numbers of the selected faces, out of `count` on the target.

    Raises InvalidTask (`no_face_found`) if there is no face, or no face with that number.
    """
    if count == 0:
        raise no_face_found("target")
    if face == "all":
        return tuple(range(count))
    if face == "largest":
        return (0,)
    if face >= count:
        raise no_face_found("target", count, face)
    return (face,)


def _region(face: Face, image: RgbImage) -> tuple[int, int, int, int]:
    """The region of the image that a face's replacement changes: left, top, right, bottom."""
    left, top, right, bottom = face.box
    margin = _MARGIN * float(np.sqrt(face.area))
    height, width = image.shape[:2]
    return (
        min(max(0, int(left - margin)), width - 1),
        min(max(0, int(top - margin)), height - 1),
        max(min(width, int(right + margin) + 1), 1),
        max(min(height, int(bottom + margin) + 1), 1),
    )


def _lay(patch: RgbImage, fade: np.ndarray[tuple[int, ...], np.dtype[np.float32]], onto: RgbImage) -> None:
    """Blend a patch into its region with opacity `fade`, from 0 to 1. Both are scaled up to a larger region."""
    size = (onto.shape[1], onto.shape[0])
    if patch.shape != onto.shape:
        patch = np.asarray(cv2.resize(patch, size, interpolation=cv2.INTER_CUBIC), np.uint8)
        fade = np.asarray(cv2.resize(fade, size, interpolation=cv2.INTER_LINEAR), np.float32)
    onto[:] = cv2.blendLinear(patch, np.ascontiguousarray(onto), fade, 1 - fade)


def _described(faces: Sequence[Face], image: RgbImage) -> tuple[FoundFace, ...]:
    height, width = image.shape[:2]
    described = []
    for face in faces:
        left, top, right, bottom = (round(value) for value in face.box)
        box = (max(left, 0), max(top, 0), min(right, width), min(bottom, height))
        described.append(FoundFace(box=box, score=round(face.score, 3)))
    return tuple(described)
