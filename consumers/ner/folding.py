"""Characters that mean the same: full and half width, Chinese and Latin punctuation."""

from __future__ import annotations

_PUNCTUATION = {
    "。": ".",
    "、": ",",
    "“": '"',
    "”": '"',
    "„": '"',
    "〝": '"',
    "〞": '"',
    "「": '"',
    "」": '"',
    "『": '"',
    "』": '"',
    "‘": "'",
    "’": "'",
    "【": "[",
    "】": "]",
    "〔": "[",
    "〕": "]",
    "〖": "[",
    "〗": "]",
    "〈": "<",
    "〉": ">",
    "—": "-",
    "‐": "-",
    "…": ".",
    "∶": ":",
}

FOLDS = str.maketrans({chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)} | _PUNCTUATION)
"""Code point → code point, for `str.translate`."""


def fold(text: str) -> str:
    """The text in half width, character by character, so that every offset stays what it was."""
    return text.translate(FOLDS)


def says_something(text: str) -> bool:
    """Whether there is a character that can be seen: neither white space nor a control or format one."""
    return any(character.isprintable() and not character.isspace() for character in text)
