"""Draws the recognized lines onto a page."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from PIL import Image, ImageDraw

from inferq.consumers.ocr import Line
from inferq.consumers.ocr.backend import RgbPage

_BOX = (226, 38, 77)
_START = (20, 120, 220)


def draw_boxes(page: RgbPage, lines: Iterable[Line], path: Path) -> None:
    """Write the page as a PNG. Each line has a frame, and a dot at the start of its text."""
    picture = Image.fromarray(page)
    pen = ImageDraw.Draw(picture)
    width = max(2, round(max(picture.size) / 800))
    for line in lines:
        pen.line([*line.box, line.box[0]], fill=_BOX, width=width, joint="curve")
        pen.circle(line.box[0], 2 * width, fill=_START)
    picture.save(path, format="PNG", compress_level=3)


def artifact_name(number: int) -> str:
    """annotated.png for page 1, annotated-2.png and so on for those after it."""
    return "annotated.png" if number == 1 else f"annotated-{number}.png"
