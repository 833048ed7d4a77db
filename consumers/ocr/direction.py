"""Which way a page's lines run. A line follows its page unless there is clear evidence that it does not.

Many short texts read both ways up: NO and ON, 06 and 90, W and M. Their scores say nothing, so the page decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from inferq.consumers.ocr.backend import TALL, RgbPage

SINGLE_CHARACTER = 3.0
"""Up to this ratio of its sides, an elongated box may be a single narrow character such as 1 or I."""
_CLEARLY = 0.1
"""The least difference in score that is evidence. Wrong readings of a turned line are often this close."""
_TURNED_OVER = 4
"""The least characters of a reading that is evidence of an upside-down line. Shorter texts score by chance."""
_ACROSS = 2
"""The same for a line that runs across the page's direction. A single stroke reads as 1, I or 一."""
_LINES_TO_READ = 8
"""The lines of a page that are read both ways if the classifier does not settle the page's direction."""
_ELONGATED = 2.0
"""The least ratio of the sides of a line whose vote counts for the page: shorter ones are often wrong."""
_MANY_VOTES = 3
_SQUEEZED = 6
_PIECE = 4
_PIECES = 5


@dataclass(frozen=True)
class Reading:
    """A line's text and the recognizer's confidence, 0 to 1."""

    text: str
    score: float

    @property
    def characters(self) -> int:
        """The number of characters, without spaces."""
        return len("".join(self.text.split()))


@dataclass(frozen=True)
class Way:
    """One way to read a box: turned by `quarters`, if the reading has `characters` and a clearly higher score."""

    quarters: int
    characters: int = 0


def pieces(line: RgbPage) -> list[RgbPage]:
    """The cutouts of a line that the orientation classifier sees: up to five for a long line.

    The classifier shrinks its input to 4:1. It cannot recognize a long line that is squeezed to that.
    """
    height, width = line.shape[:2]
    if width <= _SQUEEZED * height:
        return [line]
    starts = np.linspace(0, width - _PIECE * height, _PIECES).astype(int)
    return [line[:, start : start + _PIECE * height] for start in starts]


def is_sideways(ratios: Sequence[float]) -> bool:
    """Whether most of a page's lines run up or down, by the ratios of height to width of its boxes."""
    tall = sum(1 for ratio in ratios if ratio >= TALL)
    wide = sum(1 for ratio in ratios if ratio <= 1 / TALL)
    return tall > wide and any(ratio >= SINGLE_CHARACTER for ratio in ratios)


def quarters_along(ratio: float, sideways: bool) -> int:
    """0 if a box's text runs along its width, 1 if along its height, before any turn by a half."""
    if ratio >= SINGLE_CHARACTER:
        return 1
    if ratio <= 1 / SINGLE_CHARACTER:
        return 0
    return int(sideways)


def counts(ratio: float) -> bool:
    """Whether the classifier's vote on a box is evidence of the page's direction."""
    return max(ratio, 1 / ratio) >= _ELONGATED


def settled(votes: Sequence[int]) -> bool | None:
    """Whether lines are upside down by the classifier's votes (positive: upside down); None to read them.

    The classifier alone only settles that lines are upright.
    """
    over, upright = sum(vote for vote in votes if vote > 0), -sum(vote for vote in votes if vote < 0)
    return False if upright > 2 * over else None


def upside_down(votes: Sequence[int], as_found: Sequence[Reading], turned: Sequence[Reading]) -> bool:
    """Whether lines are upside down, by readings of a sample of them as found and turned by a half."""
    weights = [max(one.characters, other.characters) for one, other in zip(as_found, turned, strict=True)]
    if sum(weights) < _TURNED_OVER:
        return False
    gains = [other.score - one.score for one, other in zip(as_found, turned, strict=True)]
    gain = float(np.average(gains, weights=weights))
    over, upright = sum(vote for vote in votes if vote > 0), -sum(vote for vote in votes if vote < 0)
    return gain >= _CLEARLY or (gain > 0 and over >= _MANY_VOTES and over > 2 * upright)


def sample(lengths: Sequence[float]) -> list[int]:
    """The positions of the lines to read both ways: the longest."""
    return sorted(range(len(lengths)), key=lambda position: -lengths[position])[:_LINES_TO_READ]


def ways(ratio: float, *, sideways: bool, over: Sequence[bool], vote: int) -> list[Way]:
    """The ways to read a box; the first is the page's.

    `over` says whether the page's wide and tall lines are upside down. `vote` is the classifier's on this box.
    """
    along = quarters_along(ratio, sideways)
    own = along + 2 * over[along]
    found = [Way(own)]
    agrees = vote > 0 if over[along] else vote < 0
    if not agrees:
        found.append(Way((own + 2) % 4, _TURNED_OVER))
    across = 1 - along + 2 * over[1 - along]
    if (along == 0 and ratio >= TALL) or (along == 1 and ratio <= 1 / TALL):
        found += [Way(across, _ACROSS), Way((across + 2) % 4, _ACROSS)]
    elif along == 1 and ratio < SINGLE_CHARACTER:
        found.append(Way(across, _ACROSS if ratio >= TALL else 1))
    return found


def best(candidates: Sequence[tuple[Way, Reading]]) -> int:
    """The position of the reading to keep: the first one, unless another is clearly better."""
    chosen = 0
    for position, (way, reading) in enumerate(candidates):
        if reading.characters >= way.characters and reading.score >= candidates[chosen][1].score + _CLEARLY:
            chosen = position
    return chosen
