"""Prints how well OCR reads pictures that are hard for RapidOCR: `python -m tests.ocr.quality`.

The script draws the pictures. Each row is counted for inferq and for RapidOCR itself with its default settings.
It takes about ten minutes on two cores. Names of rows as arguments limit it to these.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import get_data_path
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from inferq.consumers.ocr import Line
from inferq.consumers.ocr.images import open_document
from inferq.consumers.ocr.layout import reading_order
from inferq.consumers.ocr.rapid import RapidBackend
from tests.ocr.layouts import layouts, sentence

Pixels = NDArray[np.uint8]
Found = list[tuple[str, NDArray[np.float64]]]
"""Texts with their corners, in reading order."""
Reader = Callable[[Pixels], Found]
"""Reads RGB pixels, or RGBA."""

FONTS = ("STIXGeneral", "cmr10", "DejaVuSans", "DejaVuSerif")
"""Fonts that matplotlib carries, which mediapipe requires."""
BOTH_WAYS = ["NO", "6", "9", "90", "06", "60", "96", "69", "SOS", "W", "M", "u", "n", "OH", "HO", "109", "601",
             "0.9", "6.0", "8", "11", "88", "089", "680", "pod"]  # fmt: skip
"""Texts that are also texts when they are turned over."""


def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(get_data_path(), "fonts", "ttf", f"{name}.ttf"), size)


def without_spaces(text: str) -> str:
    return "".join(text.split())


def short_texts(read: Reader, quarters: int) -> tuple[int, int]:
    """How many of the short texts on pages of prose are read as they stand on the page, and of how many."""
    right = total = 0
    for name in FONTS:
        page = Image.new("RGB", (900, 700), "white")
        pen = ImageDraw.Draw(page)
        for row in range(4):
            text = "The page stands upright and this line says so."
            pen.text((40, 20 + 50 * row), text, font=font(name, 30), fill="black")
        places = {
            (90 + number % 5 * 170, 280 + number // 5 * 85): text for number, text in enumerate(BOTH_WAYS)
        }
        for place, text in places.items():
            pen.text(place, text, font=font(name, 30), fill="black", anchor="mm")
        found = [
            (without_spaces(text), upright(corners.mean(axis=0), quarters, page.size))
            for text, corners in read(np.ascontiguousarray(np.rot90(np.array(page), quarters)))
        ]
        for place, text in places.items():
            total += 1
            right += any(got == text and np.hypot(*(centre - place)) < 40 for got, centre in found)
    return right, total


def upright(point: NDArray[np.float64], quarters: int, size: tuple[int, int]) -> NDArray[np.float64]:
    """The point on the page before it was turned to the left by `quarters`."""
    width, height = size
    x, y = point
    return np.array([(x, y), (width - y, x), (width - x, height - y), (y, height - x)][quarters])


def long_lines(read: Reader, characters: int) -> tuple[int, int]:
    """How many pages with one long line are read to the letter, spaces aside, and of how many."""
    right = total = 0
    for name, size in (("DejaVuSansMono", 16), ("DejaVuSans", 14), ("STIXGeneral", 20), ("cmr10", 20)):
        choice = random.Random(size + characters)
        for _ in range(2):
            text = sentence(choice, characters)
            page = Image.new("RGB", (int(font(name, size).getlength(text)) + 40, 80), "white")
            ImageDraw.Draw(page).text((20, 20), text, font=font(name, size), fill="black")
            found = sorted(read(np.array(page)), key=lambda line: float(line[1][0, 0]))
            right += without_spaces("".join(got for got, _ in found)) == without_spaces(text)
            total += 1
    return right, total


def many_boxes(read: Reader) -> tuple[int, int]:
    """How many of 1,200 different numbers on a page are read."""
    page = Image.new("L", (2400, 2400), 255)
    pen = ImageDraw.Draw(page)
    for number in range(1200):
        pen.text(
            (30 + 78 * (number % 30), 40 + 58 * (number // 30)), f"{number:04d}", font=font("DejaVuSans", 20)
        )
    found = {text for text, _ in read(np.array(page.convert("RGB")))}
    return len({f"{number:04d}" for number in range(1200)} & found), 1200


def till_roll(read: Reader) -> tuple[int, int]:
    """How many of the 450 articles on a till roll of 20,000 pixels with 1,350 boxes are read."""
    page = Image.new("RGB", (480, 19_840), "white")
    pen = ImageDraw.Draw(page)
    articles = [f"Article {number:03d}" for number in range(450)]
    for number, article in enumerate(articles):
        for x, text in ((20, article), (240, f"{number % 9 + 1} x"), (340, f"{number % 90 + 10}.99")):
            pen.text((x, 20 + 44 * number), text, font=font("DejaVuSans", 24), fill="black")
    found = {without_spaces(text) for text, _ in read(np.array(page))}
    return len({without_spaces(article) for article in articles} & found), len(articles)


def light_on_transparent(read: Reader) -> tuple[int, int]:
    """How many lines in white on a transparent ground are read to the letter, spaces aside."""
    right = total = 0
    for name in FONTS:
        choice = random.Random(3)
        page = Image.new("RGBA", (800, 420), (255, 255, 255, 0))
        texts = [sentence(choice, 30) for _ in range(5)]
        for row, text in enumerate(texts):
            ImageDraw.Draw(page).text((40, 30 + 70 * row), text, font=font(name, 32), fill="white")
        found = {without_spaces(got) for got, _ in read(np.array(page))}
        right += len({without_spaces(text) for text in texts} & found)
        total += len(texts)
    return right, total


def small_photo(read: Reader) -> tuple[int, int]:
    """How many lines of small print on photos of 430×250 pixels are read to the letter, spaces aside."""
    right = total = 0
    for name, size in (("DejaVuSans", 28), ("DejaVuSans", 32), ("STIXGeneral", 40), ("cmr10", 40)):
        choice = random.Random(size)
        large = Image.new("RGB", (1720, 1000), (205, 200, 190))
        texts = [sentence(choice, 30) for _ in range(14)]
        for row, text in enumerate(texts):
            ImageDraw.Draw(large).text(
                (60 + 8 * row, 20 + 68 * row), text, font=font(name, size), fill=(60, 60, 70)
            )
        found = {
            without_spaces(got)
            for got, _ in read(np.array(large.resize((430, 250), Image.Resampling.LANCZOS)))
        }
        right += len({without_spaces(text) for text in texts} & found)
        total += len(texts)
    return right, total


def columns(order: Callable[[list[Line]], list[Line]]) -> tuple[int, int]:
    """How many layouts of tests/ocr/layouts.py, upright and on their side, are put in a reader's order."""
    right = total = 0
    for angle in (0, 2, 90):
        for expected in layouts(angle).values():
            lines = random.Random(7).sample(expected, len(expected))
            right += [line.text for line in order(lines)] == [line.text for line in expected]
            total += 1
    return right, total


def inferq_reader() -> Reader:
    backend = RapidBackend(device="cpu", threads=2, detect_megapixels=5.0)

    def read(page: Pixels) -> Found:
        if page.shape[2] == 4:
            with tempfile.NamedTemporaryFile(suffix=".png") as file:
                Image.fromarray(page).save(file.name)
                with open_document(Path(file.name)) as document:
                    page = document.page(1)
        lines = reading_order([line for line in backend.read([page])[0] if line.score >= 0.5])
        return [(line.text, np.array(line.box)) for line in lines]

    return read


def rapidocr_reader() -> Reader:
    from rapidocr import RapidOCR

    library = RapidOCR(params={"Global.log_level": "critical"})

    def read(page: Pixels) -> Found:
        found: Any = library(np.ascontiguousarray(page[:, :, [2, 1, 0, 3][: page.shape[2]]]))
        if found.boxes is None:
            return []
        return list(zip(found.txts, np.asarray(found.boxes, np.float64), strict=True))

    return read


def rapidocr_order(lines: list[Line]) -> list[Line]:
    from rapidocr.ch_ppocr_det import TextDetector

    number = {tuple(map(tuple, np.float32(line.box).tolist())): line for line in lines}
    boxes = TextDetector.sorted_boxes(np.array([line.box for line in lines], np.float32))
    return [number[tuple(map(tuple, box.tolist()))] for box in boxes]


ROWS: dict[str, Callable[[Reader], tuple[int, int]]] = {
    "short texts that read both ways, on upright pages": lambda read: short_texts(read, 0),
    "the same, on pages scanned upside down": lambda read: short_texts(read, 2),
    "the same, on pages scanned on their side": lambda read: short_texts(read, 1),
    "lines of 90 characters": lambda read: long_lines(read, 90),
    "lines of 180 characters": lambda read: long_lines(read, 180),
    "lines of 420 characters": lambda read: long_lines(read, 420),
    "numbers on a page with 1,200 of them": many_boxes,
    "articles on a till roll of 1,350 boxes": till_roll,
    "lines of small print on small photos": small_photo,
    "white lines on a transparent ground": light_on_transparent,
}


def main(wanted: Sequence[str]) -> None:
    readers = inferq_reader(), rapidocr_reader()
    print("| right | of | inferq | RapidOCR itself |\n| --- | ---: | ---: | ---: |")
    for name, measure in ROWS.items():
        if not wanted or name in wanted:
            (ours, total), (theirs, _) = (measure(read) for read in readers)
            print(f"| {name} | {total} | {ours} | {theirs} |", flush=True)
    if not wanted:
        (ours, total), (theirs, _) = columns(reading_order), columns(rapidocr_order)
        print(f"| layouts in reading order | {total} | {ours} | {theirs} |")


if __name__ == "__main__":
    main(sys.argv[1:])
