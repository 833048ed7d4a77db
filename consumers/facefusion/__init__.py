"""facefusion: puts the face of one picture onto another."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from inferq.consumers.facefusion.settings import FacefusionSettings
from inferq.schemas import InputUrl, Options, Task, TaskType, always

FaceChoice = Literal["largest", "all"] | Annotated[int, Field(strict=True, ge=0, lt=1000)]
PictureFormat = Literal["png", "jpeg", "webp"]


class FacefusionOptions(Options):
    """Which of the target's faces are replaced, and what becomes of the picture."""

    face: FaceChoice = Field(
        "largest",
        description="Which faces of the target are replaced: the `largest`, `all`, or one by its number: "
        "they count from 0, the largest first, as in `target_faces`.",
        examples=["largest", "all", 1],
    )
    format: PictureFormat = Field("png", description="What kind of file the picture becomes.")
    quality: int = Field(92, ge=1, le=100, description="How closely a `jpeg` or `webp` keeps to the pixels.")


class FacefusionTask(Task):
    """Puts the face on the source onto the target. Of several faces on the source, the largest is taken.

    Both are pictures (PNG, JPEG, TIFF, WebP, GIF, BMP, JPEG 2000, AVIF, PPM), turned upright as they say;
    what is transparent becomes white, and of several pages or frames the first counts.
    """

    task_type: Literal["facefusion"]
    source_url: InputUrl
    target_url: InputUrl
    options: FacefusionOptions = FacefusionOptions()


class FoundFace(BaseModel):
    """A face, and where it is."""

    model_config = ConfigDict(frozen=True)

    box: tuple[int, int, int, int] = Field(
        description="Left, top, right, bottom in pixels of the upright picture; the latter two just outside."
    )
    score: float = Field(ge=0, le=1, description="How certain it is that this is a face.")


class FacefusionOutput(BaseModel):
    """What was found and done. The picture itself is the artifact `image`.

    FaceFusion does not say which faces it found: with it, `source_faces`, `target_faces` and `swapped` are
    null.
    """

    model_config = ConfigDict(frozen=True)

    image: str = Field(description="The name of the artifact: output.png, output.jpg or output.webp.")
    width: int = Field(ge=1, description="Pixels of the picture made, which stands upright.")
    height: int = Field(ge=1, description="Pixels.")
    preview: bool = Field(
        description="Whether this is the preview, which warps and blends, and no face-swapping model's work."
    )
    source_faces: tuple[FoundFace, ...] | None = Field(
        description="The faces on the source, the largest first: that one was used."
    )
    target_faces: tuple[FoundFace, ...] | None = Field(
        description="The faces on the target, the largest first."
    )
    swapped: tuple[int, ...] | None = Field(
        description="Which of the target's faces were replaced, by number."
    )


task_type = TaskType(
    name="facefusion",
    task=FacefusionTask,
    output=FacefusionOutput,
    engine="inferq.consumers.facefusion.engine:FacefusionEngine",
    arguments=("source_url", "target_url"),
    time_limit=600,
    summary="puts the face of one picture onto another",
    cacheable=always,
    settings=FacefusionSettings,
)
