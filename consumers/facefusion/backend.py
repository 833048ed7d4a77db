"""The protocol that face swappers implement."""

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
    """A picture on which one or more faces are replaced.

    Faces are listed largest first, and `swapped` holds indices into `target_faces`. The lists are None if the
    swapper does not report its faces.
    """

    picture: RgbImage
    source_faces: tuple[FoundFace, ...] | None = None
    target_faces: tuple[FoundFace, ...] | None = None
    swapped: tuple[int, ...] | None = None


class Backend(Protocol):
    """A loaded face swapper. `preview`: whether it works without a face-swapping model."""

    info: EngineInfo
    preview: bool

    def warm_up(self) -> None:
        """Prepare, so that the first swap is as fast as later ones."""

    def swap(self, source: RgbImage, target: RgbImage, face: FaceChoice, context: Context) -> Swap:
        """The target, with the faces that `face` selects replaced by the source's largest face.

        Raises inferq.schemas.InvalidTask (`no_face_found`, or `refused` by a content filter),
        inferq.schemas.TransientFailure, and inferq.engine.TaskAborted if the run has to stop.
        """

    def close(self) -> None:
        """Release the loaded models."""


_ROLES: Mapping[str, str] = {"source": "source_url", "target": "target_url"}


def no_face_found(where: str, found: int = 0, wanted: FaceChoice | None = None) -> InvalidTask:
    """The error to raise if `where` (`source` or `target`) lacks the wanted face."""
    if found:
        counted = "1 face" if found == 1 else f"{found} faces"
        message = (
            f"{_ROLES[where]}: the {where} has {counted}, numbered from 0, but no face {wanted}; "
            "set options.face to another number, `largest` or `all`"
        )
    else:
        message = (
            f"{_ROLES[where]}: no face was found on the {where}: send a picture with a face that looks at the "
            "camera, is at least 40 pixels wide and is not turned far aside"
        )
    return InvalidTask(message, code="no_face_found")
