"""What a face swapper must do for the engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from inferq.consumers.facefusion import FaceChoice, FoundFace
from inferq.consumers.media.pictures import RgbImage
from inferq.engine import Context
from inferq.schemas import EngineInfo, InvalidTask


@dataclass(frozen=True)
class Swap:
    """A picture with a face, or several, replaced; what a swapper cannot know is None.

    Faces are listed the largest first, and `swapped` are numbers in `target_faces`.
    """

    picture: RgbImage
    source_faces: tuple[FoundFace, ...] | None = None
    target_faces: tuple[FoundFace, ...] | None = None
    swapped: tuple[int, ...] | None = None


class Backend(Protocol):
    """A face swapper, ready to work. `preview` says that no face-swapping model is behind it."""

    info: EngineInfo
    preview: bool

    def warm_up(self) -> None:
        """Make the first swap no slower than the others."""

    def swap(self, source: RgbImage, target: RgbImage, face: FaceChoice, context: Context) -> Swap:
        """The target with the source's largest face in place of those chosen.

        Raises inferq.schemas.InvalidTask (`no_face_found`, and `refused` by a content filter),
        inferq.schemas.TransientFailure, and inferq.consumers.engine.TaskAborted once the run is to stop.
        """

    def close(self) -> None:
        """Release what was loaded."""


_ROLES: Mapping[str, str] = {"source": "source_url", "target": "target_url"}


def no_face_found(where: str, found: int = 0, wanted: FaceChoice | None = None) -> InvalidTask:
    """The error to raise where the `source` or the `target` lacks the face that is wanted."""
    if found:
        counted = "1 face" if found == 1 else f"{found} faces"
        message = (
            f"{_ROLES[where]}: the {where} has {counted}, counted from 0: there is no face {wanted}; "
            "name another in options.face, or say `largest` or `all`"
        )
    else:
        message = (
            f"{_ROLES[where]}: no face was found on the {where}: send a picture on which a face looks at the "
            "camera, at least 40 pixels wide and not much turned aside"
        )
    return InvalidTask(message, code="no_face_found")
