"""Opens a picture or document of any kind as upright RGB pages, one page at a time.

What a file is, its content says: names and content types are not looked at.
"""

from __future__ import annotations

import struct
import warnings
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import pypdfium2 as pdfium
import pypdfium2.raw as pdfium_c
from PIL import Image, ImageChops, ImageOps, UnidentifiedImageError

from consumers.ocr.backend import RgbPage
from consumers.ocr.sniff import Kind, sniff
from schemas import InvalidTask

_LONGEST_SIDE = 65_500
_MOST_ELONGATED = 200
"""A page longer than this many times its width holds no text that can be read."""
_PDF_UNITS_PER_INCH = 72
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    RuntimeError,
    OverflowError,
    KeyError,
    IndexError,
    TypeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""What Pillow's decoders raise on damaged files."""


@dataclass(frozen=True)
class Limits:
    """How much of a document is decoded: pixels per page, and the resolution (dots per inch) of a PDF."""

    max_pixels: int = 100_000_000
    dpi: int = 200


class Document(ABC):
    """An open file of one or more pages."""

    page_count: int

    @abstractmethod
    def page(self, number: int) -> RgbPage:
        """Page `number` (from 1), upright, `(height, width, 3) uint8` RGB; what is transparent is white.

        Raises InvalidTask: `truncated_image` for damaged data, `image_too_large` before anything too large
        is decoded.
        """

    @abstractmethod
    def close(self) -> None:
        """Let the file go."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def open_document(path: Path, limits: Limits = Limits()) -> Document:
    """The document in a file. Its header is read here, its pages later.

    Raises InvalidTask: `empty_file`, `not_an_image`, `truncated_image`, `image_too_large`, `encrypted_pdf`.
    """
    kind = sniff(path)
    return _Pdf(path, limits) if kind is Kind.PDF else _Picture(path, kind, limits)


class _Picture(Document):
    """What Pillow reads: one page, but for TIFF. Of an animation it is the first frame."""

    def __init__(self, path: Path, kind: Kind, limits: Limits) -> None:
        self._kind = kind
        self._limits = limits
        self._frames = [0]
        with _explained(self._kind), _own_pixel_limit():
            try:
                self._image = Image.open(path, formats=kind.formats)
            except UnidentifiedImageError as error:
                raise InvalidTask(
                    f"the {kind.value} file is damaged: its header cannot be read", code="truncated_image"
                ) from error
            try:
                self._check_size(1)
                if kind is Kind.TIFF:
                    self._frames = self._tiff_pages()
            except BaseException:
                self._image.close()
                raise
        self.page_count = len(self._frames)

    def page(self, number: int) -> RgbPage:
        with _explained(self._kind), _own_pixel_limit():
            self._image.seek(self._frames[number - 1])
            self._check_size(number)
            self._image.load()
            return _rgb(self._image)

    def close(self) -> None:
        self._image.close()

    def _check_size(self, number: int) -> None:
        check_size(*self._image.size, self._limits.max_pixels, what=f"page {number}")

    def _tiff_pages(self) -> list[int]:
        """The frames that are pages: thumbnails and masks (tag NewSubfileType of TIFF 6.0) are not."""
        pages, number = [], 0
        while True:
            try:
                self._image.seek(number)
            except EOFError:
                break
            # 254 is NewSubfileType: bit 0 marks a reduced-resolution copy, bit 2 a transparency mask.
            subfile = self._image.tag_v2.get(254, 0)  # type: ignore[attr-defined]
            if not (isinstance(subfile, int) and subfile & 0b101):
                pages.append(number)
            number += 1
        self._image.seek(0)
        return pages or [0]


class _Pdf(Document):
    """What PDFium draws; filled-in form fields included."""

    def __init__(self, path: Path, limits: Limits) -> None:
        self._limits = limits
        try:
            self._pdf = pdfium.PdfDocument(path)
        except pdfium.PdfiumError as error:
            if error.err_code == pdfium_c.FPDF_ERR_PASSWORD:
                raise InvalidTask(
                    "the PDF is encrypted and opens only with a password: send it without one",
                    code="encrypted_pdf",
                ) from error
            raise InvalidTask(
                f"the PDF is damaged or has no pages: {error}", code="truncated_image"
            ) from error
        if self._pdf.get_formtype() != pdfium_c.FORMTYPE_NONE:
            self._pdf.init_forms()
        self.page_count = len(self._pdf)
        if not self.page_count:
            self.close()
            raise InvalidTask("the PDF has no pages", code="not_an_image")

    def page(self, number: int) -> RgbPage:
        try:
            page = self._pdf[number - 1]
            try:
                return self._draw(page, number)
            finally:
                page.close()
        except pdfium.PdfiumError as error:
            raise InvalidTask(
                f"page {number} of the PDF is damaged: {error}", code="truncated_image"
            ) from error

    def _draw(self, page: pdfium.PdfPage, number: int) -> RgbPage:
        for picture in page.get_objects(filter=[pdfium_c.FPDF_PAGEOBJ_IMAGE]):
            width, height = picture.get_px_size()
            if width * height > self._limits.max_pixels:
                raise _too_large(width, height, self._limits.max_pixels, f"a picture on page {number}")
        scale = self._limits.dpi / _PDF_UNITS_PER_INCH
        width, height = (max(side * scale, 1.0) for side in page.get_size())
        # A poster is drawn more coarsely rather than refused: its print is larger too.
        scale *= min(1.0, (self._limits.max_pixels / (width * height)) ** 0.5 * 0.999)
        scale *= min(1.0, _LONGEST_SIDE / max(width, height))
        width, height = (max(side * scale, 1.0) for side in page.get_size())
        check_size(round(width), round(height), self._limits.max_pixels, what=f"page {number}")
        bitmap = page.render(scale=scale, rev_byteorder=True, prefer_bgrx=False)
        try:
            # A copy, since the bitmap's memory goes; without what may be a fourth channel.
            return np.array(bitmap.to_numpy()[:, :, :3], np.uint8, order="C")
        finally:
            bitmap.close()

    def close(self) -> None:
        self._pdf.close()


def check_size(width: int, height: int, max_pixels: int, *, what: str = "the image") -> None:
    """Raises InvalidTask (`image_too_large`) for more pixels than `max_pixels`, and for absurd shapes."""
    if width * height > max_pixels:
        raise _too_large(width, height, max_pixels, what)
    if max(width, height) > _LONGEST_SIDE:
        raise InvalidTask(
            f"{what} has {width}×{height} pixels: no side may be longer than {_LONGEST_SIDE}",
            code="image_too_large",
        )
    if max(width, height) > _MOST_ELONGATED * min(width, height):
        raise InvalidTask(
            f"{what} has {width}×{height} pixels: nothing can be read where one side is more than "
            f"{_MOST_ELONGATED} times the other",
            code="image_too_large",
        )


def _too_large(width: int, height: int, max_pixels: int, what: str) -> InvalidTask:
    return InvalidTask(
        f"{what} has {width}×{height} pixels, the limit is {max_pixels / 1e6:g} million: scale it down "
        "(or raise INFERQ_OCR_MAX_PIXELS)",
        code="image_too_large",
    )


@contextmanager
def _explained(kind: Kind) -> Iterator[None]:
    """Turns what Pillow's decoders raise on damaged data into an InvalidTask."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, which say nothing about the pixels
            yield
    except _DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk, not the file
        raise InvalidTask(
            f"the {kind.value} file is damaged or cut short: {error}", code="truncated_image"
        ) from error


@contextmanager
def _own_pixel_limit() -> Iterator[None]:
    """Lifts Pillow's own limit, since `check_size` has seen to it by the setting."""
    kept = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = kept


def _rgb(image: Image.Image) -> RgbPage:
    """A decoded picture as upright RGB."""
    if image.mode == "CMYK" and image.format in {"JPEG", "MPO"} and "adobe" not in image.info:
        # Pillow takes every CMYK JPEG for one of Adobe's, which hold inverted ink; others do not.
        image = _keeping_orientation(image, ImageChops.invert(image))
    if image.mode.startswith(("I", "F")):
        image = _keeping_orientation(image, Image.fromarray(_stretched(np.asarray(image))))
    image = ImageOps.exif_transpose(image)
    if image.mode == "LAB":
        image = image.getchannel("L")
    if image.has_transparency_data:
        coloured = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(coloured, mask=coloured.getchannel("A"))
        image = white
    return np.array(image.convert("RGB"), np.uint8)


def _keeping_orientation(original: Image.Image, changed: Image.Image) -> Image.Image:
    changed.getexif()[0x0112] = original.getexif().get(0x0112, 1)
    return changed


def _stretched(values: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> RgbPage:
    """Grey values of any depth and range (16-bit scans often use 12 bits) as 0 to 255."""
    grey = np.nan_to_num(values.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    darkest, lightest = float(grey.min()), float(grey.max())
    if lightest <= darkest:
        return np.full(grey.shape, 255, np.uint8)
    return ((grey - darkest) * (255.0 / (lightest - darkest))).astype(np.uint8)
