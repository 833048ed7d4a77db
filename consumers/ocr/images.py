"""Opens pictures and documents as upright RGB pages, one page at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import pypdfium2 as pdfium
import pypdfium2.raw as pdfium_c

from inferq.consumers.media.pictures import LONGEST_SIDE, Picture, PixelLimit
from inferq.consumers.media.sniff import Kind, sniff
from inferq.consumers.ocr.backend import RgbPage
from inferq.schemas import InvalidTask

_PDF_UNITS_PER_INCH = 72


@dataclass(frozen=True)
class Limits:
    """Limits for decoding: pixels per page, and the resolution of PDF pages in dots per inch."""

    max_pixels: int = 100_000_000
    dpi: int = 200

    @property
    def per_page(self) -> PixelLimit:
        return PixelLimit(self.max_pixels, "INFERQ_OCR_MAX_PIXELS")


class Document(ABC):
    """An open file of one or more pages."""

    page_count: int

    @abstractmethod
    def page(self, number: int) -> RgbPage:
        """Page `number` (from 1), upright, `(height, width, 3) uint8` RGB. Transparent pixels become white.

        Raises InvalidTask: `truncated_image` for damaged data, `image_too_large` before a page that is too
        large is decoded.
        """

    @abstractmethod
    def close(self) -> None:
        """Close the file."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def open_document(path: Path, limits: Limits = Limits()) -> Document:
    """Open the document in a file. This reads the header only; `page` reads the pages.

    Raises InvalidTask: `empty_file`, `not_an_image`, `truncated_image`, `image_too_large`, `too_many_pages`,
    `encrypted_pdf`.
    """
    kind = sniff(path, documents=True)
    return _Pdf(path, limits) if kind is Kind.PDF else _Picture(path, kind, limits)


class _Picture(Document):
    """A file that Pillow reads: one page, or several for TIFF. Of an animation, the first frame."""

    def __init__(self, path: Path, kind: Kind, limits: Limits) -> None:
        self._picture = Picture(path, kind, limits.per_page, name="page 1")
        try:
            self._frames = self._picture.pages()
        except BaseException:
            self._picture.close()
            raise
        self.page_count = len(self._frames)

    def page(self, number: int) -> RgbPage:
        return self._picture.decode(self._frames[number - 1], name=f"page {number}")

    def close(self) -> None:
        self._picture.close()


class _Pdf(Document):
    """A PDF that PDFium renders, including filled-in form fields."""

    def __init__(self, path: Path, limits: Limits) -> None:
        self._limits = limits
        try:
            self._pdf = pdfium.PdfDocument(path)
        except pdfium.PdfiumError as error:
            if error.err_code == pdfium_c.FPDF_ERR_PASSWORD:
                raise InvalidTask(
                    "the PDF is encrypted and needs a password: send it without encryption",
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
                raise self._limits.per_page.exceeded(width, height, f"a picture on page {number}")
        scale = self._limits.dpi / _PDF_UNITS_PER_INCH
        width, height = (max(side * scale, 1.0) for side in page.get_size())
        # A poster is rendered at a lower resolution instead of being refused: its print is larger too.
        scale *= min(1.0, (self._limits.max_pixels / (width * height)) ** 0.5 * 0.999)
        scale *= min(1.0, LONGEST_SIDE / max(width, height))
        width, height = (max(side * scale, 1.0) for side in page.get_size())
        self._limits.per_page.check(round(width), round(height), what=f"page {number}")
        bitmap = page.render(scale=scale, rev_byteorder=True, prefer_bgrx=False)
        try:
            # Copy, because closing the bitmap frees its memory; drop a possible fourth channel.
            return np.array(bitmap.to_numpy()[:, :, :3], np.uint8, order="C")
        finally:
            bitmap.close()

    def close(self) -> None:
        self._pdf.close()
