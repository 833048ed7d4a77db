"""Draws the waveform of a piece: both channels over time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from inferq.consumers.acestep.backend import CHANNELS, SAMPLE_RATE, Audio

_COLUMNS = 1200
_LANE = 180
"""The height of one channel in pixels."""
_LEFT, _RIGHT, _TOP, _BOTTOM, _GAP = 64, 28, 16, 44, 24
_STEPS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120)
"""The possible distances between two marks of the time axis, in seconds."""
_MOST_MARKS = 12
_BACKGROUND, _INK, _GRID = (255, 255, 255), (60, 66, 74), (222, 226, 231)
_PEAK, _AVERAGE = (142, 184, 229), (31, 99, 173)


class Waveform:
    """Collects the picture's data from the blocks of a piece.

    For each column of pixels it keeps the lowest and the highest sample, and the mean square.
    """

    def __init__(self, frames: int) -> None:
        """`frames` is the length of the whole piece."""
        self._frames = frames
        self._seen = 0
        self._columns = min(_COLUMNS, frames)
        self._low = np.zeros((self._columns, CHANNELS))
        self._high = np.zeros((self._columns, CHANNELS))
        self._squares = np.zeros((self._columns, CHANNELS))
        self._counts = np.zeros((self._columns, 1))

    def add(self, block: Audio) -> None:
        """Add the next block. Frames beyond the length of the piece are ignored."""
        block = block[: self._frames - self._seen]
        if not len(block):
            return
        columns = np.arange(self._seen, self._seen + len(block)) * self._columns // self._frames
        starts = np.flatnonzero(np.diff(columns, prepend=-1))
        touched = columns[starts]
        self._low[touched] = np.minimum(self._low[touched], np.minimum.reduceat(block, starts))
        self._high[touched] = np.maximum(self._high[touched], np.maximum.reduceat(block, starts))
        self._squares[touched] += np.add.reduceat(np.square(block, dtype=np.float64), starts)
        self._counts[touched, 0] += np.diff(starts, append=len(block))
        self._seen += len(block)

    def draw(self, path: Path) -> None:
        """Write the picture as a PNG: the left channel above the right one, marks in minutes and seconds.

        The light area is the range of the samples, the dark area their root mean square.
        """
        height = _TOP + CHANNELS * _LANE + (CHANNELS - 1) * _GAP + _BOTTOM
        picture = Image.new("RGB", (_LEFT + self._columns + _RIGHT, height), _BACKGROUND)
        pen = ImageDraw.Draw(picture)
        font = ImageFont.load_default(14)
        bottom = height - _BOTTOM
        duration = self._frames / SAMPLE_RATE
        for seconds in _marks(duration):
            x = _LEFT + round(seconds * SAMPLE_RATE / self._frames * (self._columns - 1))
            pen.line([(x, _TOP), (x, bottom + 6)], fill=_GRID)
            pen.text((x, bottom + 10), _clock(seconds, duration), font=font, fill=_INK, anchor="ma")
        for channel, name in enumerate(("left", "right")):
            self._draw_channel(pen, channel, _TOP + channel * (_LANE + _GAP), name, font)
        picture.save(path, format="PNG", optimize=True)

    def _draw_channel(
        self,
        pen: ImageDraw.ImageDraw,
        channel: int,
        top: int,
        name: str,
        font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    ) -> None:
        reach = (_LANE - 1) / 2
        middle = top + reach
        right = _LEFT + self._columns - 1
        for level, label in ((1.0, "1"), (0.5, ""), (0.0, "0"), (-0.5, ""), (-1.0, "-1")):
            y = middle - level * reach
            pen.line([(_LEFT, y), (right, y)], fill=_GRID)
            pen.text((_LEFT - 8, y), label, font=font, fill=_INK, anchor="rm")
        mean = np.sqrt(self._squares[:, channel] / np.maximum(self._counts[:, 0], 1))
        for column in range(self._columns):
            low, high = self._low[column, channel], self._high[column, channel]
            x = _LEFT + column
            pen.line([(x, middle - high * reach), (x, middle - low * reach)], fill=_PEAK)
            above, below = min(mean[column], high), min(mean[column], -low)
            pen.line([(x, middle - above * reach), (x, middle + below * reach)], fill=_AVERAGE)
        pen.text((8, middle - reach / 2), name, font=font, fill=_INK, anchor="lm")


def _marks(duration: float) -> list[float]:
    """The positions of the time axis's marks, in seconds."""
    step = next((step for step in _STEPS if duration / step <= _MOST_MARKS), _STEPS[-1])
    return [round(number * step, 1) for number in range(int(duration / step + 1e-9) + 1)]


def _clock(seconds: float, duration: float) -> str:
    """The label of a mark: minutes and seconds in a piece of a minute or more, else seconds."""
    if duration < 60:
        return f"{seconds:g} s"
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
