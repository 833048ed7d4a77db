"""Opens a picture of any kind as upright RGB pixels.

What a file is, its content says: names and content types are not looked at.
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
"""Pixels that no side of a picture may exceed; the libraries' own limits are not much beyond."""
_MOST_ELONGATED = 200
"""A picture longer than this many times its width shows nothing that can be made out."""
_MOST_FRAMES = 10_000
"""Pillow looks through all frames before one for each that it finds: counting on would take minutes."""
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
"""What turns a picture of each EXIF orientation upright; one of orientation 1 is."""


@dataclass(frozen=True)
class PixelLimit:
    """The most pixels that a picture may have, and the setting that says so."""

    pixels: int
    setting: str

    def check(self, width: int, height: int, *, what: str = "the image") -> None:
        """Raises InvalidTask (`image_too_large`) for more pixels, and for absurd shapes."""
        if width * height > self.pixels:
            raise self.exceeded(width, height, what)
        if max(width, height) > LONGEST_SIDE:
            raise InvalidTask(
                f"{what} has {width}×{height} pixels: no side may be longer than {LONGEST_SIDE}",
                code="image_too_large",
            )
        if max(width, height) > _MOST_ELONGATED * min(width, height):
            raise InvalidTask(
                f"{what} has {width}×{height} pixels: nothing can be made out where one side is more than "
                f"{_MOST_ELONGATED} times the other",
                code="image_too_large",
            )

    def exceeded(self, width: int, height: int, what: str) -> InvalidTask:
        """The error to raise for more pixels than the limit."""
        return InvalidTask(
            f"{what} has {width}×{height} pixels, the limit is {self.pixels / 1e6:g} million: scale it down "
            f"(or raise {self.setting})",
            code="image_too_large",
        )


class Picture:
    """An open picture: one frame, or several. Its header has been read, its pixels have not."""

    def __init__(self, path: Path, kind: Kind, limit: PixelLimit, *, name: str = "the image") -> None:
        """Raises InvalidTask: `truncated_image` for a damaged header, `image_too_large` beyond the limit."""
        self.kind = kind
        self._limit = limit
        with _explained(kind), _own_pixel_limit():
            try:
                self._image = Image.open(path, formats=kind.formats)
            except (UnidentifiedImageError, MemoryError) as error:
                # No pixels are asked for yet: too much memory can only be what a damaged length asks for.
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

        Of a TIFF all are but thumbnails and masks (tag NewSubfileType of TIFF 6.0); of an animation only
        the first one is. Raises InvalidTask: `truncated_image`, `too_many_pages`.
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
        """The pixels of a frame, upright; what is transparent is white.

        Raises InvalidTask: `truncated_image` for damaged data, `image_too_large` before anything too large
        is decoded.
        """
        with _explained(self.kind), _own_pixel_limit():
            self._image.seek(frame)
            self._limit.check(*self._image.size, what=name)
            self._image.load()
            return _rgb(self._image)

    @property
    def colour_profile(self) -> bytes | None:
        """The ICC profile that the pixels of `decode` still follow, if the file has one."""
        profile = self._image.info.get("icc_profile")
        return profile if isinstance(profile, bytes) and self._image.mode in {"RGB", "RGBA", "P"} else None

    def close(self) -> None:
        """Let the file go."""
        self._image.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def open_picture(path: Path, limit: PixelLimit) -> Picture:
    """The picture in a file.

    Raises InvalidTask: `empty_file`, `not_an_image`, `truncated_image`, `image_too_large`.
    """
    return Picture(path, sniff(path), limit)


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
    """Lifts Pillow's own limit, since ours has been checked by then."""
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
        # Pillow takes every CMYK JPEG for one of Adobe's, which hold inverted ink; others do not.
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
    """What turns a decoded picture upright, by its EXIF block; None where that says nothing that can be read.

    Pillow's own `exif_transpose` writes the whole block anew, which fails where a tag has an unusual type.
    """
    try:
        return _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # Pillow's parser raises nearly anything; the pixels are sound
        return None


def _stretched(values: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> RgbImage:
    """Grey values of any depth and range (16-bit scans often use 12 bits) as 0 to 255."""
    grey = np.nan_to_num(values.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    darkest, lightest = float(grey.min()), float(grey.max())
    if lightest <= darkest:
        return np.full(grey.shape, 255, np.uint8)
    return ((grey - darkest) * (255.0 / (lightest - darkest))).astype(np.uint8)
