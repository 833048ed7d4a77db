"""facefusion: replaces faces on one picture with the face of another.

engine        two pictures in, one out, with any of the backends
backend       the protocol of face swappers
resident      FaceFusion, loaded once for all tasks
driver        serves swaps in FaceFusion's own Python
headless      FaceFusion, one headless run per task
precision     FaceFusion's face swappers by precision
group_runner  runs a command in a process group, and kills the group when the caller ends
preview       swaps faces by their landmarks, without a face-swapping model
landmarks     finds faces and their landmarks
warp          warps one face into the shape of another
blend         blends a warped face into a picture
settings      the settings of the face-swapping engine
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from inferq.consumers.facefusion.settings import FacefusionSettings
from inferq.schemas import InputUrl, Options, Task, TaskType, always

FaceChoice = Literal["largest", "all"] | Annotated[int, Field(strict=True, ge=0, lt=1000)]
PictureFormat = Literal["png", "jpeg", "webp"]


class FacefusionOptions(Options):
    """Which of the target's faces to replace, and the file format of the new picture."""

    face: FaceChoice = Field(
        "largest",
        description="Which faces of the target to replace: the `largest`, `all`, or a face's number. Numbers "
        "start at 0 for the largest face, as in `target_faces`.",
        examples=["largest", "all", 1],
    )
    format: PictureFormat = Field("png", description="The file format of the new picture.")
    quality: int = Field(92, ge=1, le=100, description="Compression quality of a `jpeg` or `webp`.")


class FacefusionTask(Task):
    """Replaces faces on the target with the largest face on the source.

    Both are pictures (PNG, JPEG, TIFF, WebP, GIF, BMP, JPEG 2000, AVIF, PPM). Their orientation is applied,
    transparent pixels become white, and only the first page or frame is used.
    """

    task_type: Literal["facefusion"]
    source_url: InputUrl
    target_url: InputUrl
    options: FacefusionOptions = FacefusionOptions()


class FoundFace(BaseModel):
    """A face and its position."""

    model_config = ConfigDict(frozen=True)

    box: tuple[int, int, int, int] = Field(
        description="Left, top, right, bottom in pixels of the upright picture; right and bottom are exclusive."
    )
    score: float = Field(ge=0, le=1, description="Confidence that this is a face.")


class FacefusionOutput(BaseModel):
    """The faces that were found and replaced. The new picture is the artifact `image`.

    FaceFusion does not report the faces that it finds: with it, `source_faces`, `target_faces` and `swapped`
    are null.
    """

    model_config = ConfigDict(frozen=True)

    image: str = Field(description="The name of the artifact: output.png, output.jpg or output.webp.")
    width: int = Field(ge=1, description="Pixels of the new picture, which is upright.")
    height: int = Field(ge=1, description="Pixels.")
    preview: bool = Field(
        description="Whether the preview made this picture: it warps and blends, without a face-swapping model."
    )
    source_faces: tuple[FoundFace, ...] | None = Field(
        description="The faces on the source, largest first. The first one was used."
    )
    target_faces: tuple[FoundFace, ...] | None = Field(description="The faces on the target, largest first.")
    swapped: tuple[int, ...] | None = Field(
        description="The numbers of the target's faces that were replaced."
    )


task_type = TaskType(
    name="facefusion",
    task=FacefusionTask,
    output=FacefusionOutput,
    engine="inferq.consumers.facefusion.engine:FacefusionEngine",
    arguments=("source_url", "target_url"),
    time_limit=600,
    summary="replaces faces on a picture with the face of another",
    cacheable=always,
    settings=FacefusionSettings,
)
