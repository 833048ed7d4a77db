"""Finds faces with 468 landmarks each on a picture, with the models in mediapipe's wheel."""

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
"""A picture's longer side is scaled down to this many pixels for the search."""
_PASSES = ((0, 512), (0, 256), (2, 512), (1, 512), (3, 512))
"""The passes of the search, which ends with the first one that finds a face: quarter turns of the picture to the
left, and the windows' side in pixels. The detector sees a window at 192 × 192 pixels; a face needs 15 of them."""
_CROP = 256
"""The side in pixels of the square that the landmark model gets per face; it scales it to 192 × 192."""
_CROP_REACH = 2.2
"""The ratio of that square's side to the detector's box: the square includes hair and neck."""
_SAME_FACE = 0.4
"""Two boxes whose overlap is a larger share of their union are the same face."""
_MOST_YAW = 30.0
"""The most degrees that a face may be turned aside, measured by its landmarks, which show 45 degrees as 30.
Beyond this, half of the face is hidden, and cannot be warped."""
_MOST_ROLL = 15.0
"""The most degrees that a face may lean in its straightened square; beyond, landmarks are inaccurate."""
_SMALLEST = 16.0
"""The minimum width of a face in pixels: a smaller face shows no features."""

_RIGHT_EYE, _LEFT_EYE = (33, 133), (362, 263)
"""The corners of the eyes. The person's right eye is on the picture's left."""
_RIGHT_CHEEK, _LEFT_CHEEK = 234, 454


@dataclass(frozen=True)
class Face:
    """A face that was found.

    `points` are its landmarks, `(468, 3) float32`: x and y in pixels of the picture, z in the
    same unit, smaller if nearer. `score` is the detector's confidence, from 0 to 1.
    """

    points: Points
    score: float

    @cached_property
    def box(self) -> tuple[float, float, float, float]:
        """Left, top, right, bottom in pixels. It may extend beyond the picture."""
        left, top = (float(value) for value in self.points[:, :2].min(axis=0))
        right, bottom = (float(value) for value in self.points[:, :2].max(axis=0))
        return left, top, right, bottom

    @property
    def area(self) -> float:
        """The area of the box in square pixels."""
        left, top, right, bottom = self.box
        return (right - left) * (bottom - top)


@dataclass(frozen=True)
class _Found:
    """A face from the detector: the centre and side of its box, and the eyes, in pixels."""

    centre: Points
    side: float
    right_eye: Points
    left_eye: Points
    score: float


class FaceFinder:
    """The loaded detector and landmark model. Use it from one thread only."""

    def __init__(self) -> None:
        """Raises ImportError if mediapipe is not installed, InstallationError for an unsupported version."""
        # Otherwise every start logs many lines about delegates and missing GPUs.
        os.environ.setdefault("GLOG_minloglevel", "2")
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        solutions = _mediapipe()
        # Model 1 is for small and distant faces.
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
        """The faces of an upright `(height, width, 3)` picture, largest first.

        A face may lean. Faces that are sideways or upside down are found only if no face is upright. A face
        that is turned aside by more than about 45 degrees is left out. A face must be at least 40 pixels
        wide, and at least 1/25 of the picture's longer side. `checkpoint` is called between steps and may
        raise to stop the search.
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
                # If all faces are turned aside, further passes would only find false ones.
                faces = [face for face in faces if abs(yaw(face.points)) <= _MOST_YAW]
                # The position breaks ties, so that the order is deterministic.
                return sorted(faces, key=lambda face: (-face.area, face.box))
        return []

    def _search(self, image: RgbImage, window: int) -> list[_Found]:
        """The detector's faces on the whole picture and in its windows, highest score first."""
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
        # Cut a large face from the small picture: shrinking the original that much would alias.
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
            # The detector's angle was wrong: try again, straightened by the landmarks' angle.
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
            # The square may show a neighbouring face as well; that face has a square of its own.
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
    """The degrees that a face with these landmarks (`(468, 3)`) is turned aside; 0 faces the camera."""
    cheeks = points[_LEFT_CHEEK] - points[_RIGHT_CHEEK]
    return float(np.degrees(np.arctan2(cheeks[2], np.hypot(cheeks[0], cheeks[1]))))


def _mediapipe() -> Any:
    import mediapipe

    if not hasattr(mediapipe, "solutions"):
        raise InstallationError(
            f"mediapipe {mediapipe.__version__} has no face models: pip install mediapipe==0.10.21",
            code="engine_not_installed",
        )
    logging.getLogger("absl").setLevel(logging.ERROR)
    return mediapipe.solutions


def _starts(side: int, window: int) -> list[int]:
    """The start of each window along a side. Windows overlap by half, and the last ends with the picture."""
    if side <= window:
        return [0]
    count = -(-(side - window) // (window // 2)) + 1
    return [round(number * (side - window) / (count - 1)) for number in range(count)]


def _unturned(found: _Found, shape: tuple[int, ...], quarters: int) -> _Found:
    """A face found on a picture turned by `quarters` to the left, in pixels of the unturned picture."""
    height, width = shape[:2]

    def back(point: Points) -> Points:
        x, y = float(point[0]), float(point[1])
        turned = {0: (x, y), 1: (width - y, x), 2: (width - x, height - y), 3: (y, height - x)}
        return np.array(turned[quarters], np.float32)

    return _Found(back(found.centre), found.side, back(found.right_eye), back(found.left_eye), found.score)


def _straightening(centre: Points, side: float, across: Points) -> NDArray[np.float64]:
    """The `(2, 3)` transform that moves a face to the centre of its square, upright."""
    scale = _CROP / (side * _CROP_REACH)
    angle = -float(np.arctan2(across[1], across[0]))
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    turn = np.array([[cos, -sin], [sin, cos]])
    return np.concatenate([turn, (_CROP / 2 - turn @ centre)[:, None]], axis=1)


def _between(points: Points, pair: tuple[int, int]) -> Points:
    return np.asarray(points[list(pair), :2].mean(axis=0), np.float32)


def _angle(one: Points, other: Points) -> float:
    """The angle from one direction to another in degrees, -180 to 180."""
    cross = float(other[0] * one[1] - other[1] * one[0])
    return float(np.degrees(np.arctan2(cross, float(one @ other))))


def _overlap(one: Face, other: Face) -> float:
    """The overlap of two faces' boxes as a share of their union."""
    left, top = max(one.box[0], other.box[0]), max(one.box[1], other.box[1])
    right, bottom = min(one.box[2], other.box[2]), min(one.box[3], other.box[3])
    shared = max(0.0, right - left) * max(0.0, bottom - top)
    return shared / (one.area + other.area - shared)
