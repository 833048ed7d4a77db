"""Opens pictures and documents as upright RGB pages, one page at a time."""

from __future__ import annotations

import ctypes
import math
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
_A4 = 595 * 842
"""The area of a page of A4, in square PDF units."""
_SMALL_PRINT, _READABLE_PRINT = 4.0, 8.0
"""Font sizes in PDF units: print below the first is drawn as large as the second."""
_INVISIBLE_TEXT = {pdfium_c.FPDF_TEXTRENDERMODE_INVISIBLE, pdfium_c.FPDF_TEXTRENDERMODE_CLIP}


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
        """Page `number` (from 1), upright, `(height, width, 3) uint8` RGB.

        Transparent pixels get a colour that contrasts with the visible ones: white if possible.
        Raises InvalidTask: `truncated_image` for damaged data, `unsupported_image`, `missing_font`,
        `image_too_large` before a page that is too large is decoded.
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

    Raises InvalidTask: `empty_file`, `not_an_image`, `truncated_image`, `unsupported_image`, `image_too_large`,
    `too_many_pages`, `encrypted_pdf`, `xfa_form`.
    """
    kind = sniff(path, documents=True)
    return _Pdf(path, limits) if kind is Kind.PDF else _Picture(path, kind, limits)


def open_with(path: Path, *, max_pixels: int, dpi: int) -> Document:
    """`open_document`, for `Decoder`."""
    return open_document(path, Limits(max_pixels, dpi))


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
        return self._picture.decode(self._frames[number - 1], name=f"page {number}", contrasting=True)

    def close(self) -> None:
        self._picture.close()


class _Pdf(Document):
    """A PDF that PDFium renders, including filled-in form fields."""

    def __init__(self, path: Path, limits: Limits) -> None:
        self._limits = limits
        try:
            self._pdf = pdfium.PdfDocument(path)
        except pdfium.PdfiumError as error:
            raise _refused_pdf(error) from error
        try:
            self._check_forms()
            self.page_count = len(self._pdf)
            if not self.page_count:
                raise InvalidTask("the PDF has no pages", code="truncated_image")
        except BaseException:
            self.close()
            raise

    def _check_forms(self) -> None:
        kind = self._pdf.get_formtype()
        if kind == pdfium_c.FORMTYPE_XFA_FULL:
            raise InvalidTask(
                "the PDF is an XFA form; its pages only say that another viewer is needed: open it in Adobe "
                "Acrobat and print it to a PDF",
                code="xfa_form",
            )
        if kind == pdfium_c.FORMTYPE_ACRO_FORM:
            self._pdf.init_forms()

    def page(self, number: int) -> RgbPage:
        try:
            page = self._pdf[number - 1]
            try:
                if not all(page.get_size()):  # the CropBox is outside the MediaBox
                    page.set_cropbox(*page.get_mediabox())
                    page.close()
                    page = self._pdf[number - 1]
                return self._draw(page, number)
            finally:
                page.close()
        except (pdfium.PdfiumError, ValueError, OverflowError, ctypes.ArgumentError) as error:
            raise InvalidTask(
                f"page {number} of the PDF is damaged and cannot be drawn", code="truncated_image"
            ) from error

    def _draw(self, page: pdfium.PdfPage, number: int) -> RgbPage:
        scale = self._scale(page, number)
        width, height = (max(side * scale, 1.0) for side in page.get_size())
        # A poster is rendered at a lower resolution instead of being refused: its print is larger too.
        scale *= min(1.0, (self._limits.max_pixels / (width * height)) ** 0.5 * 0.999)
        scale *= min(1.0, LONGEST_SIDE / max(width, height))
        width, height = (max(side * scale, 1.0) for side in page.get_size())
        self._limits.per_page.check(round(width), round(height), what=f"page {number}")
        bitmap = page.render(scale=scale, rev_byteorder=True, prefer_bgrx=False)
        try:
            # Copy, because closing the bitmap frees its memory; drop a possible fourth channel.
            pixels = np.array(bitmap.to_numpy()[:, :, :3], np.uint8, order="C")
        finally:
            bitmap.close()
        if pixels.min() == pixels.max() and (fonts := _absent_fonts(page)):
            raise InvalidTask(
                f"page {number} would be blank: the PDF does not contain its fonts ({', '.join(fonts)}), and they are "
                "not installed here: embed the fonts, or send a picture of the page",
                code="missing_font",
            )
        return pixels

    def _scale(self, page: pdfium.PdfPage, number: int) -> float:
        """Pixels per PDF unit."""
        scale = wanted = self._limits.dpi / _PDF_UNITS_PER_INCH
        width, height = page.get_size()
        small = width * height < _A4 / 2
        kinds = [pdfium_c.FPDF_PAGEOBJ_IMAGE, *([pdfium_c.FPDF_PAGEOBJ_TEXT] if small else [])]
        for item in page.get_objects(filter=kinds):
            a, b, c, d, _, _ = item.get_matrix().get()
            if item.type == pdfium_c.FPDF_PAGEOBJ_IMAGE:
                across, down = item.get_px_size()
                if across * down > self._limits.max_pixels:
                    raise self._limits.per_page.exceeded(across, down, f"a picture on page {number}")
                shown = math.hypot(a, b) * math.hypot(c, d)
                wanted = max(wanted, math.sqrt(across * down / shown) if shown else 0.0)
            elif 0 < (print_size := _font_size(item) * math.hypot(c, d)) < _SMALL_PRINT:
                wanted = max(wanted, scale * _READABLE_PRINT / print_size)
        # A page this small may be a large one: UserUnit, which PDFium ignores, scales it, or a scan claims a
        # resolution that is too high. It gets at most the pixels of A4.
        return min(wanted, scale * math.sqrt(_A4 / (width * height))) if small else scale

    def close(self) -> None:
        self._pdf.close()


def _refused_pdf(error: pdfium.PdfiumError) -> InvalidTask:
    match error.err_code:
        case pdfium_c.FPDF_ERR_PASSWORD:
            return InvalidTask(
                "the PDF is encrypted and needs a password: send it without encryption", code="encrypted_pdf"
            )
        case pdfium_c.FPDF_ERR_SECURITY:
            return InvalidTask(
                "the PDF is encrypted for the owner of a certificate: send it without encryption",
                code="encrypted_pdf",
            )
        case pdfium_c.FPDF_ERR_SUCCESS:
            return InvalidTask("the PDF has no pages", code="truncated_image")
        case _:
            return InvalidTask("the PDF is damaged or has no pages", code="truncated_image")


def _absent_fonts(page: pdfium.PdfPage) -> list[str]:
    """The names of the fonts of a page's visible text that the PDF does not contain."""
    names = set()
    texts = page.get_textpage()
    try:
        for item in page.get_objects(filter=[pdfium_c.FPDF_PAGEOBJ_TEXT]):
            font = pdfium_c.FPDFTextObj_GetFont(item)
            visible = pdfium_c.FPDFTextObj_GetTextRenderMode(item) not in _INVISIBLE_TEXT
            text = (ctypes.c_ushort * 100)()
            pdfium_c.FPDFTextObj_GetText(item, texts, text, len(text))
            written = bytes(text).decode("utf-16-le", "replace").strip("\0 \t\r\n\xa0\u3000")
            if visible and written and pdfium_c.FPDFFont_GetIsEmbedded(font) == 0:
                name = ctypes.create_string_buffer(100)
                pdfium_c.FPDFFont_GetBaseFontName(font, name, len(name))
                names.add("".join(filter(str.isprintable, name.value.decode("utf-8", "replace"))))
    finally:
        texts.close()
    return sorted(names)[:3]


def _font_size(text: pdfium.PdfObject) -> float:
    size = ctypes.c_float()
    pdfium_c.FPDFTextObj_GetFontSize(text, size)
    return size.value
