"""Reads the text of a file, or reports the file's actual format."""

from __future__ import annotations

import codecs
import re
from pathlib import Path

from inferq.consumers.ner.folding import has_visible_text
from inferq.schemas import InvalidTask

_MOST_BYTES = 4
"""The most bytes of a character in UTF-8."""

_SIGNATURES: tuple[tuple[bytes, str], ...] = (
    (rb"%PDF-", "a PDF: send its text, or read it with the type ocr"),
    (rb"PK\x03\x04", "a ZIP archive or an Office document: send its text"),
    (rb"\xd0\xcf\x11\xe0", "an Office document: send its text"),
    (rb"\{\\rtf", "an RTF document: send its text"),
    (rb"\x1f\x8b", "gzip-compressed: unpack it first"),
    (rb"\x89PNG|\xff\xd8\xff|GIF8[79]a|II\*\0|MM\0\*|RIFF....WEBP", "a picture: read it with the type ocr"),
    (rb"\x7fELF|MZ.{10,}\0\0\0", "a program"),
)

_WIDE_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)

_CONTINUATIONS = bytes(range(0x80, 0xC0))
"""The bytes of a character in UTF-8 after its first."""

_ENCODINGS: tuple[tuple[str, str, bytes], ...] = (
    # Punctuation and the frequent characters of each: the first level of GB 2312, of Big5, and of JIS X 0208.
    ("GBK or GB18030", "GB18030", rb"[\xa1-\xa3\xb0-\xd7][\xa1-\xfe]"),
    ("Big5", "BIG5", rb"[\xa1-\xa3\xa4-\xc6][\x40-\x7e\xa1-\xfe]"),
    ("Shift-JIS", "CP932", rb"[\x81-\x83\x88-\x97][\x40-\x7e\x80-\xfc]"),
    # Accented letters and signs between ASCII ones.
    ("Latin-1 or Windows-1252", "WINDOWS-1252", rb"(?<![\x80-\xff])[\x80-\xff](?![\x80-\xff])"),
)
"""Names, iconv's names, and what the texts in an encoding consist of, beside ASCII."""
_ENOUGH = 0.8
"""The share of a text's high bytes that must fit."""

_CONTROLS = re.compile(r"[\0-\x08\x0e-\x1a\x1c-\x1f]")
_FEW_CONTROLS = 0.1
"""A file with a larger share of control characters does not count as text."""


def read_text(path: Path, max_characters: int) -> str:
    """The text of a UTF-8 file, unchanged, including its byte order mark and line ends.

    Raises InvalidTask: `empty_text`, `text_too_long`, `binary_file` or `not_utf8`. The message names the actual
    format if it can be recognized.
    """
    size = path.stat().st_size
    if size == 0:
        raise InvalidTask("the file at text_url is empty", code="empty_text")
    if size > _MOST_BYTES * max_characters:
        raise InvalidTask(
            f"the file at text_url has {size} bytes, but a text may have at most {max_characters} characters: split it "
            "(or raise INFERQ_NER_MAX_CHARACTERS)",
            code="text_too_long",
        )
    content = path.read_bytes()
    for pattern, what in _SIGNATURES:
        if re.match(pattern, content, re.DOTALL):
            raise InvalidTask(f"the file at text_url is not text but {what}", code="binary_file")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _explain(content, error) from error
    if len(_CONTROLS.findall(text)) > _FEW_CONTROLS * len(text):
        raise InvalidTask(
            "the file at text_url is not text: it has too many control characters"
            + (" (is it UTF-16? convert it to UTF-8)" if "\0" in text else ""),
            code="binary_file",
        )
    if not has_visible_text(text):
        raise InvalidTask("the file at text_url holds only white space", code="empty_text")
    return text


def check_length(text: str, max_characters: int, name: str) -> None:
    """Raises InvalidTask (`text_too_long`) for a text, called `name`, that is too long."""
    if len(text) > max_characters:
        raise InvalidTask(
            f"{name} has {len(text)} characters, but a text may have at most {max_characters}: split it (or raise "
            "INFERQ_NER_MAX_CHARACTERS)",
            code="text_too_long",
        )


def _explain(content: bytes, error: UnicodeDecodeError) -> InvalidTask:
    if content.startswith(_WIDE_MARKS):
        return InvalidTask(
            "the file at text_url is UTF-16, not UTF-8: convert it (iconv -f UTF-16 -t UTF-8)",
            code="not_utf8",
        )
    said = f"the file at text_url is not UTF-8: byte {error.start} is 0x{content[error.start]:02x}"
    if error.start >= len(content) - _MOST_BYTES and error.reason == "unexpected end of data":
        return InvalidTask(
            "the file at text_url ends in the middle of a character: it is cut off", code="not_utf8"
        )
    if re.match(rb"[\x80-\xbf]{1,3}[^\x80-\xbf]", content) and _is_utf8(content.lstrip(_CONTINUATIONS)):
        return InvalidTask(
            "the file at text_url begins in the middle of a character: its beginning is missing",
            code="not_utf8",
        )
    if (guess := _guess(content)) is not None:
        name, encoding = guess
        return InvalidTask(
            f"{said}; it looks like {name}: convert it (iconv -f {encoding} -t UTF-8)", code="not_utf8"
        )
    if b"\0" in content or len(re.findall(rb"[\0-\x08\x0e-\x1a]", content)) > _FEW_CONTROLS * len(content):
        return InvalidTask("the file at text_url is not text but binary data", code="binary_file")
    return InvalidTask(f"{said}; convert the file to UTF-8", code="not_utf8")


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _guess(content: bytes) -> tuple[str, str] | None:
    """The encoding that a text seems to have, as its name and iconv's; None if none fits."""
    fits: dict[tuple[str, str], float] = {}
    for name, encoding, frequent in _ENCODINGS:
        try:
            text = content.decode(encoding)
        except UnicodeDecodeError:
            continue
        if _CONTROLS.search(text):
            continue
        expected = sum(1 for character in text if not character.isascii())
        fits[name, encoding] = len(_pairs(content, frequent)) / expected
    best = max(fits, key=lambda guess: fits[guess], default=None)
    return best if best is not None and fits[best] >= _ENOUGH else None


def _pairs(content: bytes, frequent: bytes) -> list[bytes]:
    """The frequent characters. Others take two bytes from a high one on, so that the pairs stay in step."""
    found = re.findall(rb"(%b)|[\x81-\xfe][\x40-\xfe]" % frequent, content, re.DOTALL)
    return [pair for pair in found if pair]
