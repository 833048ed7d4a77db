"""What a model must do for us, and what its labels mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from inferq.schemas import EngineInfo


@dataclass(frozen=True)
class Span:
    """A stretch of text with a type; `start` and `end` count characters."""

    start: int
    end: int
    type: str
    label: str | None = None
    score: float | None = None
    source: Literal["model", "dictionary"] = "model"


class Backend(Protocol):
    """A model, loaded."""

    info: EngineInfo
    window: int
    """The most characters in one piece of text."""

    def read(self, pieces: Sequence[str]) -> list[list[Span]]:
        """The entities of each piece, computed together.

        No piece is longer than `window`, empty, or begins or ends with white space.
        """


LAC_TYPES = {
    "PER": "PER",
    "nr": "PER",
    "LOC": "LOC",
    "ns": "LOC",
    "ORG": "ORG",
    "nt": "ORG",
    "TIME": "TIME",
    "t": "TIME",
    "nw": "WORK",
    "nz": "MISC",
}
"""LAC's labels for names → types. It has two for the common ones, the second from its parts of speech."""
