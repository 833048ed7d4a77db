"""Opens pictures as upright RGB pixels.

A file's content decides its kind; its name and content type are ignored.
"""

from __future__ import annotations

import io
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, UnidentifiedImageError

from inferq.consumers.media.sniff import Kind, sniff
from inferq.schemas import InvalidTask

RgbImage = NDArray[np.uint8]
"""An upright picture: `(height, width, 3) uint8`, RGB."""

LONGEST_SIDE = 65_500
"""The most pixels of a side of a picture. The libraries' own limits are slightly higher."""
_MOST_ELONGATED = 200
"""The highest ratio of a picture's sides. Beyond it, no content is recognizable."""
_MOST_FRAMES = 10_000
"""The most frames that are counted. Pillow rereads all earlier frames for each, so more take minutes."""
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
"""The exceptions that Pillow's decoders raise on damaged files."""
_UNSUPPORTED = re.compile(
    r"cannot handle|unknown (pixel mode|data organization)|unsupported|not supported", re.I
)
"""Pillow's words for sound files of a variant that it cannot decode."""
_JPEG_PROCESSES = {0xC0, 0xC1, 0xC2, 0xC9, 0xCA}
"""The frame headers of JPEG (ITU-T T.81, table B.1) that libjpeg decodes; others are lossless or hierarchical."""
_AVIF_LONGEST_SIDE, _AVIF_PIXELS = 32_768, 16_384**2
"""libavif's own limits."""
_VISIBLE = 64
"""The lowest alpha of a pixel that counts as print."""
_SIMILAR = 63
"""Print whose grey level differs by this or less from its ground is hard to see."""
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation → the transformation that turns a picture upright; with orientation 1 it is upright."""


@dataclass(frozen=True)
class PixelLimit:
    """The most pixels that a picture may have, and the setting that defines this."""

    pixels: int
    setting: str

    def check(self, width: int, height: int, *, what: str = "the image") -> None:
        """Raises InvalidTask (`image_too_large`) for more pixels, a side that is too long or an extreme ratio."""
        if width * height > self.pixels:
            raise self.exceeded(width, height, what)
        if max(width, height) > LONGEST_SIDE:
            raise InvalidTask(
                f"{what} has {width}×{height} pixels: a side may have at most {LONGEST_SIDE}",
                code="image_too_large",
            )
        if max(width, height) > _MOST_ELONGATED * min(width, height):
            raise InvalidTask(
                f"{what} has {width}×{height} pixels: its longer side may be at most "
                f"{_MOST_ELONGATED} times its shorter side",
                code="image_too_large",
            )

    def exceeded(self, width: int, height: int, what: str) -> InvalidTask:
        """The error to raise for more pixels than the limit."""
        return InvalidTask(
            f"{what} has {width}×{height} pixels; the limit is {self.pixels / 1e6:g} million: scale it down "
            f"(or raise {self.setting})",
            code="image_too_large",
        )


class Picture:
    """An open picture of one or more frames. Only its header is read so far."""

    def __init__(self, path: Path, kind: Kind, limit: PixelLimit, *, name: str = "the image") -> None:
        """Raises InvalidTask.

        `truncated_image` for a damaged header, `unsupported_image` for a variant that cannot be decoded,
        `image_too_large` beyond the limit.
        """
        self.kind = kind
        self._limit = limit
        # From a path, Pillow maps uncompressed pixels into memory with the sides of the turned picture.
        self._file = path.open("rb")
        try:
            with _explained(kind, self._file), _own_pixel_limit():
                self._image = self._open(name)
                limit.check(*self._image.size, what=name)
        except BaseException:
            self._file.close()
            raise

    def _open(self, name: str) -> Image.Image:
        try:
            return Image.open(self._file, formats=self.kind.formats)
        except (UnidentifiedImageError, MemoryError) as error:
            # No pixels are read yet, so only a damaged length field can cause a request for too much memory.
            if self.kind is Kind.AVIF:
                _check_avif(self._file, self._limit, name)
            reason = _refusal(self._file, self.kind)
            if _UNSUPPORTED.search(reason):
                raise _unsupported(self.kind, reason) from error
            raise InvalidTask(
                f"the {self.kind.value} file is damaged: its header cannot be read", code="truncated_image"
            ) from error

    def pages(self) -> list[int]:
        """The frames that are pages.

        In a TIFF, these are all frames except thumbnails and masks (tag NewSubfileType of TIFF 6.0). In an
        animation, it is the first one only. Raises InvalidTask: `truncated_image`, `too_many_pages`.
        """
        if self.kind is not Kind.TIFF:
            return [0]
        pages, number = [], 0
        with _explained(self.kind, self._file), _own_pixel_limit():
            while True:
                try:
                    self._image.seek(number)
                except EOFError:
                    break
                if number == _MOST_FRAMES:
                    raise InvalidTask(
                        f"the TIFF has more than {_MOST_FRAMES} frames: split it", code="too_many_pages"
                    )
                # 254 is NewSubfileType: bit 0 marks a reduced-resolution copy, bit 2 a transparency mask.
                subfile = self._image.tag_v2.get(254, 0)  # type: ignore[attr-defined]
                if not (isinstance(subfile, int) and subfile & 0b101):
                    pages.append(number)
                number += 1
            self._image.seek(0)
        return pages or [0]

    def decode(self, frame: int = 0, *, name: str = "the image", contrasting: bool = False) -> RgbImage:
        """The pixels of a frame, upright. Transparent pixels become white.

        With `contrasting`, they become white, black or grey: the one in which the fewest visible pixels vanish.

        Raises InvalidTask: `truncated_image` for damaged data, `unsupported_image` for a variant that cannot be
        decoded, `image_too_large` before a frame that is too large is decoded.
        """
        with _explained(self.kind, self._file), _own_pixel_limit():
            self._image.seek(frame)
            self._limit.check(*self._image.size, what=name)
            try:
                self._image.load()
            except OSError as error:
                if self.kind is not Kind.JPEG or error.errno is not None:
                    raise
                if (complete := _without_end_marker(self._file)) is None:
                    raise
                self._image = complete
            return _rgb(self._image, contrasting=contrasting)

    @property
    def colour_profile(self) -> bytes | None:
        """The ICC profile of the pixels that `decode` gives, or None if the file has none."""
        profile = self._image.info.get("icc_profile")
        return profile if isinstance(profile, bytes) and self._image.mode in {"RGB", "RGBA", "P"} else None

    def close(self) -> None:
        """Close the file."""
        self._image.close()
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def open_picture(path: Path, limit: PixelLimit) -> Picture:
    """Open the picture in a file.

    Raises InvalidTask: `empty_file`, `not_an_image`, `truncated_image`, `unsupported_image`, `image_too_large`.
    """
    return Picture(path, sniff(path), limit)


class SinglePicture:
    """A picture as a document of one page. `Decoder` opens it in another process."""

    page_count = 1

    def __init__(self, path: Path, *, max_pixels: int, setting: str) -> None:
        """`setting` is the variable that defines `max_pixels`. Raises what `open_picture` raises."""
        self._picture = open_picture(path, PixelLimit(max_pixels, setting))
        self.colour_profile: bytes | None = None

    def page(self, _: int) -> RgbImage:
        """The pixels. The only page has the number 1."""
        pixels = self._picture.decode()
        self.colour_profile = self._picture.colour_profile
        return pixels

    def close(self) -> None:
        """Close the file."""
        self._picture.close()


@contextmanager
def _explained(kind: Kind, file: BinaryIO) -> Iterator[None]:
    """Turns the exceptions of Pillow's decoders into InvalidTask: the file is damaged, or of an unsupported variant."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they concern metadata, not the pixels
            yield
    except _DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk failed; the file is not damaged
        if kind is Kind.JPEG and (process := _unsupported_jpeg(file)):
            raise _unsupported(kind, process) from error
        if _UNSUPPORTED.search(str(error)):
            raise _unsupported(kind, str(error)) from error
        raise InvalidTask(
            f"the {kind.value} file is damaged or truncated: {error}", code="truncated_image"
        ) from error


def _unsupported(kind: Kind, reason: str) -> InvalidTask:
    return InvalidTask(
        f"the {kind.value} file is of a variant that is not supported ({reason}): convert it to PNG",
        code="unsupported_image",
    )


def _refusal(file: BinaryIO, kind: Kind) -> str:
    """Pillow's reason for not opening the file. `Image.open` itself gives none."""
    factory, _ = Image.OPEN[kind.formats[0]]
    file.seek(0)
    try:
        factory(file, "").close()
    except KeyError as error:
        return f"unsupported value {error}"
    except Exception as error:
        # ImageFile turns an unknown TIFF compression, a KeyError, into a SyntaxError.
        if kind is Kind.TIFF and isinstance(error.__cause__, KeyError) and str(error).isdigit():
            return f"unsupported compression {error}"
        return str(error)
    return ""


def _unsupported_jpeg(file: BinaryIO) -> str | None:
    """Why libjpeg cannot decode a JPEG, by its frame header; None if it can."""
    file.seek(2)
    while True:
        marker = file.read(4)
        if len(marker) < 4 or marker[0] != 0xFF:
            return None
        code, length = marker[1], int.from_bytes(marker[2:], "big")
        if 0xC0 <= code <= 0xCF and code not in {0xC4, 0xC8, 0xCC}:
            bits = file.read(1)
            if code not in _JPEG_PROCESSES:
                return "lossless or hierarchical JPEG"
            return f"{bits[0]} bits per sample" if bits and bits[0] != 8 else None
        file.seek(max(length - 2, 0), io.SEEK_CUR)


def _check_avif(file: BinaryIO, limit: PixelLimit, name: str) -> None:
    """Raises InvalidTask (`image_too_large`) for an AVIF beyond our limit or libavif's, by its `ispe` box."""
    file.seek(0)
    found = re.search(rb"ispe....(.{4})(.{4})", file.read(65_536), re.DOTALL)
    if found is None:
        return
    width, height = (int.from_bytes(side, "big") for side in found.groups())
    limit.check(width, height, what=name)
    if max(width, height) > _AVIF_LONGEST_SIDE or width * height > _AVIF_PIXELS:
        raise InvalidTask(
            f"{name} has {width}×{height} pixels, more than AVIF files may have here: scale it down, "
            "or convert it to JPEG",
            code="image_too_large",
        )


def _without_end_marker(file: BinaryIO) -> Image.Image | None:
    """The picture of a JPEG that lacks only its end marker; None if pixels are missing too.

    libjpeg fills missing pixels up without an error. Further data behind the file's end would change them, but it
    does not change a complete picture.
    """
    file.seek(0)
    data = file.read().rstrip(b"\xff")
    noise = bytes(value * 89 % 251 for value in range(1, 2000))
    more = b"".join(b"%b\xff%c" % (noise, 0xD0 + number) for number in range(8))
    first, second = (
        Image.open(io.BytesIO(data + rest + b"\xff\xd9"), formats=("JPEG",)) for rest in (b"", more)
    )
    first.load()
    second.load()
    return first if first.tobytes() == second.tobytes() else None


@contextmanager
def _own_pixel_limit() -> Iterator[None]:
    """Disables Pillow's own limit, because ours is checked already."""
    kept = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = kept


def _rgb(image: Image.Image, *, contrasting: bool) -> RgbImage:
    """A decoded picture as upright RGB."""
    turn = _turn(image)
    if image.mode == "CMYK" and image.format in {"JPEG", "MPO"} and "adobe" not in image.info:
        # Pillow treats every CMYK JPEG as one of Adobe's, which are inverted; others are not.
        image = ImageChops.invert(image)
    if image.mode.startswith(("I", "F")):
        image = Image.fromarray(_stretched(np.asarray(image)))
    if turn is not None:
        image = image.transpose(turn)
    if image.mode == "LAB":
        image = image.getchannel("L")
    if image.has_transparency_data:
        coloured = image.convert("RGBA")
        grey = _contrasting(coloured) if contrasting else 255
        ground = Image.new("RGB", image.size, (grey, grey, grey))
        ground.paste(coloured, mask=coloured.getchannel("A"))
        image = ground
    return np.array(image.convert("RGB"), np.uint8)


def _contrasting(image: Image.Image) -> int:
    """The grey level of a ground for an RGBA picture: the one with the fewest similar pixels beside it."""
    transparent = image.getchannel("A").point(lambda alpha: 255 if alpha < _VISIBLE else 0)
    beside = transparent
    for across, down in ((1, 0), (-1, 0), (0, 1), (0, -1)):
        beside = ImageChops.lighter(beside, ImageChops.offset(transparent, across, down))
    counts = image.convert("L").histogram(ImageChops.subtract(beside, transparent))
    return min((255, 0, 128), key=lambda level: sum(counts[max(level - _SIMILAR, 0) : level + _SIMILAR + 1]))


def _turn(image: Image.Image) -> Image.Transpose | None:
    """The transformation that turns a decoded picture upright, by its EXIF block; None if there is none.

    Pillow's `exif_transpose` rewrites the whole block, which fails if a tag has an unusual type.
    """
    try:
        return _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # Pillow's parser raises many kinds of exceptions; the pixels are intact
        return None


def _stretched(values: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> RgbImage:
    """Grey values of any depth and range (16-bit scans often use 12 bits), scaled to 0 to 255."""
    grey = np.nan_to_num(values.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    darkest, lightest = float(grey.min()), float(grey.max())
    if lightest <= darkest:
        return np.full(grey.shape, 255, np.uint8)
    return ((grey - darkest) * (255.0 / (lightest - darkest))).astype(np.uint8)
