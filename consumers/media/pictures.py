"""Opens pictures as upright RGB pixels.

A file's content decides its kind; its name and content type are ignored.
"""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

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
        """Raises InvalidTask: `truncated_image` for a damaged header, `image_too_large` beyond the limit."""
        self.kind = kind
        self._limit = limit
        with _explained(kind), _own_pixel_limit():
            try:
                self._image = Image.open(path, formats=kind.formats)
            except (UnidentifiedImageError, MemoryError) as error:
                # No pixels are read yet, so only a damaged length field can cause a request for too much memory.
                raise InvalidTask(
                    f"the {kind.value} file is damaged: its header cannot be read", code="truncated_image"
                ) from error
            try:
                limit.check(*self._image.size, what=name)
            except BaseException:
                self._image.close()
                raise

    def pages(self) -> list[int]:
        """The frames that are pages.

        In a TIFF, these are all frames except thumbnails and masks (tag NewSubfileType of TIFF 6.0). In an
        animation, it is the first one only. Raises InvalidTask: `truncated_image`, `too_many_pages`.
        """
        if self.kind is not Kind.TIFF:
            return [0]
        pages, number = [], 0
        with _explained(self.kind), _own_pixel_limit():
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

    def decode(self, frame: int = 0, *, name: str = "the image") -> RgbImage:
        """The pixels of a frame, upright. Transparent pixels become white.

        Raises InvalidTask: `truncated_image` for damaged data, `image_too_large` before a frame that is too
        large is decoded.
        """
        with _explained(self.kind), _own_pixel_limit():
            self._image.seek(frame)
            self._limit.check(*self._image.size, what=name)
            self._image.load()
            return _rgb(self._image)

    @property
    def colour_profile(self) -> bytes | None:
        """The ICC profile of the pixels that `decode` gives, or None if the file has none."""
        profile = self._image.info.get("icc_profile")
        return profile if isinstance(profile, bytes) and self._image.mode in {"RGB", "RGBA", "P"} else None

    def close(self) -> None:
        """Close the file."""
        self._image.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def open_picture(path: Path, limit: PixelLimit) -> Picture:
    """Open the picture in a file.

    Raises InvalidTask: `empty_file`, `not_an_image`, `truncated_image`, `image_too_large`.
    """
    return Picture(path, sniff(path), limit)


@contextmanager
def _explained(kind: Kind) -> Iterator[None]:
    """Turns the exceptions of Pillow's decoders on damaged data into InvalidTask."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they concern metadata, not the pixels
            yield
    except _DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk failed; the file is not damaged
        raise InvalidTask(
            f"the {kind.value} file is damaged or truncated: {error}", code="truncated_image"
        ) from error


@contextmanager
def _own_pixel_limit() -> Iterator[None]:
    """Disables Pillow's own limit, because ours is checked already."""
    kept = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = kept


def _rgb(image: Image.Image) -> RgbImage:
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
        white = Image.new("RGB", image.size, "white")
        white.paste(coloured, mask=coloured.getchannel("A"))
        image = white
    return np.array(image.convert("RGB"), np.uint8)


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
