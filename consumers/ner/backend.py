"""The protocol of NER models, and the types of their labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from inferq.schemas import EngineInfo


@dataclass(frozen=True)
class Span:
    """A typed span of a text; `start` and `end` are offsets in characters."""

    start: int
    end: int
    type: str
    label: str | None = None
    score: float | None = None
    source: Literal["model", "dictionary", "pattern"] = "model"


class Backend(Protocol):
    """A loaded model."""

    info: EngineInfo
    window: int
    """The maximum length of one piece of text, in characters."""

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
"""LAC's labels for names → types. Common types have two labels, the second from its parts of speech."""
