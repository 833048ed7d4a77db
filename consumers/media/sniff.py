"""Detects the kind of a picture or document by its first bytes."""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path

from inferq.schemas import InvalidTask

_HEAD = 1024
"""The number of bytes that are read. A PDF's header may start this late (ISO 32000-1, annex H.3.4.1)."""


class Kind(Enum):
    """A supported kind of file."""

    PNG = "PNG"
    JPEG = "JPEG"
    GIF = "GIF"
    BMP = "BMP"
    TIFF = "TIFF"
    WEBP = "WebP"
    JPEG2000 = "JPEG 2000"
    AVIF = "AVIF"
    PPM = "PPM"
    PDF = "PDF"

    @property
    def formats(self) -> tuple[str, ...]:
        """The names of the only Pillow decoders that may open such a file."""
        return ("JPEG", "MPO") if self is Kind.JPEG else (self.name,)


_SIGNATURES: tuple[tuple[bytes, Kind], ...] = (
    (rb"\x89PNG\r\n\x1a\n", Kind.PNG),
    (rb"\xff\xd8\xff", Kind.JPEG),
    (rb"GIF8[79]a", Kind.GIF),
    (rb"(II\*\0|MM\0\*|II\+\0|MM\0\+)", Kind.TIFF),
    (rb"RIFF....WEBP", Kind.WEBP),
    (rb"(\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51)", Kind.JPEG2000),
    (rb"....ftyp(avif|avis|mif1.{4,40}avif)", Kind.AVIF),
    (rb"P[1-6]\s", Kind.PPM),
    # The length of the header that follows tells a BMP from text; writers put anything into the reserved fields.
    (rb"BM.{12}[\x0c\x10\x28\x34\x38\x40\x6c\x7c]\0\0\0", Kind.BMP),
    (rb".{0,1019}%PDF-", Kind.PDF),
)

_REFUSED: tuple[tuple[bytes, str], ...] = (
    (rb"....ftyp(hei|hev|mif1|msf1)", "a HEIC picture: convert it to JPEG or PNG"),
    (rb"....ftyp", "a video"),
    (rb"\x1a\x45\xdf\xa3", "a video"),
    (rb"PK\x03\x04", "a ZIP archive or an Office document: send its pages as PDF or pictures"),
    (rb"\xd0\xcf\x11\xe0", "an Office document: save it as PDF"),
    (rb"\x1f\x8b", "gzip-compressed"),
    (rb"%!PS", "PostScript: convert it to PDF"),
)

_MARKUP: tuple[tuple[bytes, str], ...] = (
    (rb"(?s)(<\?xml|<!--|<!doctype svg|<svg).*<svg|<svg", "an SVG drawing: render it to PNG first"),
    (rb"<!doctype html|<html|<head|<body", "an HTML page, perhaps an error or a login page"),
    (rb"<\?xml|<[a-z]", "XML"),
    (rb"[{\[]", "JSON or text"),
)


def sniff(path: Path, *, documents: bool = False) -> Kind:
    """The kind of the file at `path`. `documents`: whether a PDF is allowed.

    Raises InvalidTask: `empty_file`, `truncated_image` if the file ends within its signature, or `not_an_image`.
    The message names the actual kind if it can be recognized.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if not head:
        raise InvalidTask("the input file is empty", code="empty_file")
    for pattern, kind in _SIGNATURES:
        if re.match(pattern, head, re.DOTALL):
            if kind is Kind.PDF and not documents:
                raise InvalidTask(
                    "the input is not an image but a PDF: send a picture of its page", code="not_an_image"
                )
            return kind
    raise InvalidTask(f"the input is not an image but {_describe(head, documents)}", code="not_an_image")


def _describe(head: bytes, documents: bool) -> str:
    for pattern, what in _REFUSED:
        if re.match(pattern, head, re.DOTALL):
            return (
                what if documents else what.partition(": send its pages")[0].partition(": save it as PDF")[0]
            )
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for pattern, what in _MARKUP:
        if re.match(pattern, text):
            return what
    if not head.strip(b"\0"):
        return "only zero bytes"
    try:
        # Leave out the last bytes: they may be an incomplete character.
        head.decode("utf-8") if len(head) < _HEAD else head[:-4].decode("utf-8", "strict")
    except UnicodeDecodeError:
        known = [kind.value for kind in Kind if documents or kind is not Kind.PDF]
        return f"of an unknown kind; supported are {', '.join(known[:-1])} and {known[-1]}"
    return "text"
