"""Finds faces on a picture, with 468 landmarks each, by mediapipe's models, which come in its wheel."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from inferq.consumers.media.pictures import RgbImage
from inferq.schemas import InstallationError

Points = NDArray[np.float32]

_SEARCH_SIDE = 1024
"""Pixels to which a picture's longer side is scaled down before faces are looked for."""
_PASSES = ((0, 512), (0, 256), (2, 512), (1, 512), (3, 512))
"""How faces are looked for, until some are found: by how many quarters the picture is turned to the left, and
in windows of how many pixels. The detector sees each window at 192 × 192, and a face needs 15 of those."""
_CROP = 256
"""Pixels of the square in which the landmarks of one face are looked for; the model sees it at 192 × 192."""
_CROP_REACH = 2.2
"""How much wider than the detector's box that square is: brow to chin, with hair and neck."""
_SAME_FACE = 0.4
"""Two boxes that share more than this part of their union are one face, found twice."""
_MOST_YAW = 30.0
"""Degrees that a face may be turned aside by what its landmarks say, who see 45 of them as 30. Beyond, half
of it is hidden, and there is nothing to warp."""
_MOST_ROLL = 15.0
"""Degrees by which a face in its straightened square may still lean; the landmarks suffer beyond."""
_SMALLEST = 16.0
"""Pixels that a face is wide at least: of a smaller one no feature can be told."""

_RIGHT_EYE, _LEFT_EYE = (33, 133), (362, 263)
"""The corners of the eyes: of the person's right one, which is on the picture's left."""
_RIGHT_CHEEK, _LEFT_CHEEK = 234, 454


@dataclass(frozen=True)
class Face:
    """A face that was found.

    `points` are its landmarks, `(468, 3) float32`: x and y in pixels of the picture, z as deep, nearer ones
    smaller. `score` says how certain the detector is, from 0 to 1.
    """

    points: Points
    score: float

    @cached_property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom in pixels; it may reach beyond the picture."""
        left, top = (float(value) for value in self.points[:, :2].min(axis=0))
        right, bottom = (float(value) for value in self.points[:, :2].max(axis=0))
        return left, top, right, bottom

    @property
    def area(self) -> float:
        """Square pixels of the box."""
        left, top, right, bottom = self.box
        return (right - left) * (bottom - top)


@dataclass(frozen=True)
class _Found:
    """What the detector says of a face: the centre and side of its box, the eyes, in pixels."""

    centre: Points
    side: float
    right_eye: Points
    left_eye: Points
    score: float


class FaceFinder:
    """The detector and the landmark model, loaded. To be used from one thread."""

    def __init__(self) -> None:
        """Raises ImportError where mediapipe is not there, InstallationError where it is another version."""
        # Otherwise every start prints a page about delegates and missing GPUs.
        os.environ.setdefault("GLOG_minloglevel", "2")
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        solutions = _mediapipe()
        # Model 1 is the one for small and distant faces.
        self._detector = solutions.face_detection.FaceDetection(
            model_selection=1, min_detection_confidence=0.5
        )
        self._mesh = solutions.face_mesh.FaceMesh(
            static_image_mode=True, max_num_faces=2, refine_landmarks=False, min_detection_confidence=0.5
        )

    def close(self) -> None:
        """Release the models."""
        self._detector.close()
        self._mesh.close()

    def find(self, image: RgbImage, checkpoint: Callable[[], None] = lambda: None) -> list[Face]:
        """The faces of an upright `(height, width, 3)` picture, the largest first.

        A face may lean, or lie on its side or its head where no other stands upright. One that is turned
        aside by more than about 45 degrees is left out. Found are those as wide as 40 pixels and as a
        25th of the picture's longer side. `checkpoint` is called between steps, and may raise to stop.
        """
        scale = min(1.0, _SEARCH_SIDE / max(image.shape[:2]))
        small = image
        if scale < 1:
            size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
            small = np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)
        for quarters, window in _PASSES:
            checkpoint()
            turned = np.ascontiguousarray(np.rot90(small, quarters))
            faces: list[Face] = []
            for found in self._search(turned, window):
                checkpoint()
                face = self._landmarks(image, small, scale, _unturned(found, small.shape, quarters))
                if face is not None and not any(_overlap(face, other) > _SAME_FACE for other in faces):
                    faces.append(face)
            if faces:
                # To look on where all are turned aside would find faces that are none.
                faces = [face for face in faces if abs(yaw(face.points)) <= _MOST_YAW]
                # The position decides between equals, so that the order never changes.
                return sorted(faces, key=lambda face: (-face.area, face.box))
        return []

    def _search(self, image: RgbImage, window: int) -> list[_Found]:
        """What the detector finds on the whole picture and in windows of it, the most certain first."""
        found = list(self._detect(image, 0, 0))
        for top in _starts(image.shape[0], window):
            for left in _starts(image.shape[1], window):
                seen = image[top : top + window, left : left + window]
                if seen.shape != image.shape:
                    found += self._detect(np.ascontiguousarray(seen), left, top)
        return sorted(found, key=lambda one: -one.score)

    def _detect(self, image: RgbImage, left: int, top: int) -> Iterator[_Found]:
        height, width = image.shape[:2]
        for detection in self._detector.process(image).detections or []:
            box = detection.location_data.relative_bounding_box
            right_eye, left_eye = (
                np.array([point.x * width + left, point.y * height + top], np.float32)
                for point in detection.location_data.relative_keypoints[:2]
            )
            yield _Found(
                centre=np.array(
                    [
                        (box.xmin + box.width / 2) * width + left,
                        (box.ymin + box.height / 2) * height + top,
                    ],
                    np.float32,
                ),
                side=max(box.width * width, box.height * height),
                right_eye=right_eye,
                left_eye=left_eye,
                score=min(max(float(detection.score[0]), 0.0), 1.0),
            )

    def _landmarks(self, image: RgbImage, small: RgbImage, scale: float, found: _Found) -> Face | None:
        """The landmarks of one face that was found on `small`, in pixels of `image`."""
        # A large face is cut from the small picture, since to shrink it by much would alias.
        source = small if found.side * _CROP_REACH >= _CROP else image
        to_source = np.float32(1.0 if source is small else 1 / scale)
        centre, side = found.centre * to_source, found.side * float(to_source)
        across = found.left_eye - found.right_eye
        for _ in range(3):
            points = self._mesh_at(source, centre, side, across)
            if points is None:
                return None
            leaning, across = across, _between(points, _LEFT_EYE) - _between(points, _RIGHT_EYE)
            if abs(_angle(across, leaning)) <= _MOST_ROLL:
                break
            # It leans otherwise than the detector saw: once more, straightened by what the landmarks say.
        else:
            return None
        face = Face(points / np.float32(scale) if source is small else points, found.score)
        left, top, right, bottom = face.box
        return face if min(right - left, bottom - top) >= _SMALLEST else None

    def _mesh_at(self, image: RgbImage, centre: Points, side: float, across: Points) -> Points | None:
        """The landmarks of the face around `centre`, whose eyes lie in the direction `across`."""
        to_crop = _straightening(centre, side, across)
        crop = cv2.warpAffine(
            image, to_crop, (_CROP, _CROP), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
        )
        meshes = self._mesh.process(crop).multi_face_landmarks or []
        back = cv2.invertAffineTransform(to_crop)
        best, nearest = None, 0.5 / _CROP_REACH
        for mesh in meshes:
            inside = np.array([(p.x, p.y, p.z) for p in mesh.landmark], np.float32) * _CROP
            # Another face beside this one may be seen as well; it has a square of its own.
            off = float(np.linalg.norm(inside[:, :2].mean(axis=0) - _CROP / 2)) / _CROP
            if off <= nearest:
                best, nearest = inside, off
        if best is None:
            return None
        flat = best[:, :2] @ back[:, :2].T + back[:, 2]
        depth = best[:, 2:] * (side * _CROP_REACH / _CROP)
        return np.asarray(np.concatenate([flat, depth], axis=1), np.float32)


def mesh_edges() -> list[tuple[int, int]]:
    """The edges between the landmarks, as pairs of their numbers."""
    return sorted((int(one), int(other)) for one, other in _mediapipe().face_mesh.FACEMESH_TESSELATION)


def yaw(points: Points) -> float:
    """Degrees that a face with these landmarks (`(468, 3)`) is turned aside; 0 faces the camera."""
    cheeks = points[_LEFT_CHEEK] - points[_RIGHT_CHEEK]
    return float(np.degrees(np.arctan2(cheeks[2], np.hypot(cheeks[0], cheeks[1]))))


def _mediapipe() -> Any:
    import mediapipe

    if not hasattr(mediapipe, "solutions"):
        raise InstallationError(
            f"mediapipe {mediapipe.__version__} brings no face models: pip install mediapipe==0.10.21",
            code="engine_not_installed",
        )
    logging.getLogger("absl").setLevel(logging.ERROR)
    return mediapipe.solutions


def _starts(side: int, window: int) -> list[int]:
    """Where the windows of a side begin: they overlap by half, and the last one ends with the picture."""
    if side <= window:
        return [0]
    count = -(-(side - window) // (window // 2)) + 1
    return [round(number * (side - window) / (count - 1)) for number in range(count)]


def _unturned(found: _Found, shape: tuple[int, ...], quarters: int) -> _Found:
    """What was found on a picture turned by `quarters` to the left, in pixels of the picture as it was."""
    height, width = shape[:2]

    def back(point: Points) -> Points:
        x, y = float(point[0]), float(point[1])
        turned = {0: (x, y), 1: (width - y, x), 2: (width - x, height - y), 3: (y, height - x)}
        return np.array(turned[quarters], np.float32)

    return _Found(back(found.centre), found.side, back(found.right_eye), back(found.left_eye), found.score)


def _straightening(centre: Points, side: float, across: Points) -> NDArray[np.float64]:
    """The `(2, 3)` transform that brings a face into the middle of its square, upright."""
    scale = _CROP / (side * _CROP_REACH)
    angle = -float(np.arctan2(across[1], across[0]))
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    turn = np.array([[cos, -sin], [sin, cos]])
    return np.concatenate([turn, (_CROP / 2 - turn @ centre)[:, None]], axis=1)


def _between(points: Points, pair: tuple[int, int]) -> Points:
    return np.asarray(points[list(pair), :2].mean(axis=0), np.float32)


def _angle(one: Points, other: Points) -> float:
    """Degrees from one direction to another, -180 to 180."""
    cross = float(other[0] * one[1] - other[1] * one[0])
    return float(np.degrees(np.arctan2(cross, float(one @ other))))


def _overlap(one: Face, other: Face) -> float:
    """Which part of their union two faces' boxes share."""
    left, top = max(one.box[0], other.box[0]), max(one.box[1], other.box[1])
    right, bottom = min(one.box[2], other.box[2]), min(one.box[3], other.box[3])
    shared = max(0.0, right - left) * max(0.0, bottom - top)
    return shared / (one.area + other.area - shared)
