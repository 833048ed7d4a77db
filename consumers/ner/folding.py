"""Maps equivalent characters to one form: full and half width, Chinese and Latin punctuation."""

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
    # The dot within foreign names has many forms.
    "•": "·",
    "‧": "·",
    "・": "·",
    "･": "·",
    "∙": "·",
    "⋅": "·",
}

FOLDS = str.maketrans({chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)} | _PUNCTUATION)
"""Code point → code point, for `str.translate`."""


def fold(text: str) -> str:
    """The text in half width. Each character maps to one character, so offsets stay valid."""
    return text.translate(FOLDS)


def has_visible_text(text: str) -> bool:
    """Whether the text has a visible character: no white space, control or format character."""
    return any(character.isprintable() and not character.isspace() for character in text)
