"""ocr: reads the text on a picture or a document, line by line, with boxes.

engine        pages in, lines out, with any of the OCR libraries
backend       the protocol of OCR libraries, and the geometry that they share
rapid         RapidOCR
paddle        PaddleOCR
images        pictures and documents as upright pages
selection     page selections such as `1-3,7`
direction     the direction of a page's lines
long_lines    cuts very long lines, and joins their texts
layout        the reading order of a page's lines
annotate      draws the lines onto a page
settings      the settings of the OCR engine
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from inferq.consumers.ocr.selection import check_selection
from inferq.consumers.ocr.settings import OcrSettings
from inferq.schemas import InputUrl, Options, Task, TaskType, always


def _one_page(value: object) -> object:
    """A page's number as a selection: `1` means the same as `"1"`."""
    return str(value) if type(value) is int else value


_Selection = Annotated[
    str,
    StringConstraints(max_length=200, pattern=r"^[0-9]{1,6}(-[0-9]{0,6})?(,[0-9]{1,6}(-[0-9]{0,6})?)*$"),
    AfterValidator(check_selection),
]
PageSelection = Annotated[
    _Selection,
    BeforeValidator(_one_page, json_schema_input_type=_Selection | Annotated[int, Field(ge=1, lt=1_000_000)]),
]


class OcrOptions(Options):
    """Which pages and lines to read, and whether to draw their boxes."""

    annotated: bool = Field(
        False,
        description="Also write each page with its boxes drawn: annotated.png, annotated-2.png and so on.",
    )
    min_score: float = Field(0.5, ge=0, le=1, description="The output leaves out lines with a lower score.")
    pages: PageSelection | None = Field(
        None,
        description="Which pages of a document to read, such as `1-3,7` or `5-`; the default is all pages. "
        "Pages beyond the document's end are ignored, but at least one page must remain.",
        examples=["1-3,7"],
    )


class OcrTask(Task):
    """Reads a picture (PNG, JPEG, TIFF, WebP, GIF, BMP, JPEG 2000, AVIF, PPM) or a PDF."""

    task_type: Literal["ocr"]
    image_url: InputUrl
    options: OcrOptions = OcrOptions()


Point = tuple[float, float]
Box = tuple[Point, Point, Point, Point]


class Line(BaseModel):
    """A line of text and its position."""

    model_config = ConfigDict(frozen=True)

    text: str
    score: float = Field(ge=0, le=1, description="Confidence of the recognition.")
    box: Box = Field(
        description="The corners [x, y] in pixels of the upright page, clockwise from the text's top left."
    )


class Page(BaseModel):
    """One page with its lines in reading order. Its file's orientation is applied, so it is upright."""

    model_config = ConfigDict(frozen=True)

    page: int = Field(ge=1, description="The page's number in the document.")
    width: int = Field(description="Pixels.")
    height: int = Field(description="Pixels.")
    text: str = Field(description="The lines, one per row.")
    lines: tuple[Line, ...]


class FailedPage(BaseModel):
    """A page of a document that could not be read, and why."""

    model_config = ConfigDict(frozen=True)

    page: int = Field(ge=1, description="The page's number in the document.")
    code: str = Field(description="The reason, such as `truncated_image` or `image_too_large`.")
    message: str = Field(description="The reason in words.")


class OcrOutput(BaseModel):
    """The text that was read. A picture is a document of one page."""

    model_config = ConfigDict(frozen=True)

    text: str = Field(description="The text of all pages, with an empty row between two pages.")
    page_count: int = Field(
        ge=1, description="The number of pages in the document, including pages that were not read."
    )
    pages: tuple[Page, ...] = Field(description="The pages that were read.")
    failed_pages: tuple[FailedPage, ...] = Field(
        (),
        description="Selected pages that could not be read. If no page could be read, the task fails instead.",
    )


task_type = TaskType(
    name="ocr",
    task=OcrTask,
    output=OcrOutput,
    engine="inferq.consumers.ocr.engine:OcrEngine",
    arguments=("image_url",),
    summary="reads the text on pictures and documents",
    cacheable=always,
    settings=OcrSettings,
)
