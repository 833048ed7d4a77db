"""Derives from a prompt what the preview can play: tempo, key, mood, instruments."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

Voice = Literal["piano", "electric piano", "guitar", "strings", "pad", "organ", "synth", "flute", "bells"]
Drums = Literal["none", "soft", "straight", "rock", "four on the floor"]


@dataclass(frozen=True)
class Plan:
    """The plan of a piece.

    `tonic` is a pitch class (0 is C). `swing` is the delay of every second eighth, in beats. `sevenths`: whether
    chords have four notes. `melody` is None if the piece has no melody.
    """

    bpm: float
    beats: int
    tonic: int
    minor: bool
    chords: Voice
    melody: Voice | None
    bass: bool
    drums: Drums
    swing: float
    sevenths: bool


class _Style(NamedTuple):
    bpm: float
    drums: Drums
    chords: Voice
    melody: Voice | None
    minor: bool | None = None
    swing: float = 0.0
    sevenths: bool = False


_PLAIN = _Style(100, "straight", "piano", "flute")

# The first style that a prompt names wins, so the more specific styles are first.
_STYLES: tuple[tuple[str, _Style], ...] = (
    ("lofi", _Style(78, "soft", "electric piano", "piano", True, 0.12, True)),
    ("ambient|meditation|drone|soundscape", _Style(60, "none", "pad", "bells")),
    ("lullaby|music box", _Style(68, "none", "bells", "bells", False)),
    ("ballad", _Style(70, "soft", "piano", "strings")),
    ("jazz|swing|blues|bossa", _Style(116, "soft", "electric piano", "piano", None, 0.16, True)),
    ("soul|r&b|funk", _Style(100, "straight", "electric piano", "organ", None, 0.06, True)),
    ("hiphop|trap|rap", _Style(86, "soft", "electric piano", "bells", True, 0.08)),
    ("techno|trance|rave", _Style(132, "four on the floor", "synth", "synth", True)),
    ("house|edm|disco|dance|club", _Style(124, "four on the floor", "synth", "synth")),
    ("synthwave|retrowave|electronic|synthpop", _Style(108, "four on the floor", "synth", "synth", True)),
    ("metal|punk", _Style(160, "rock", "guitar", "guitar", True)),
    ("rock", _Style(132, "rock", "guitar", "organ")),
    ("folk|country|acoustic", _Style(98, "soft", "guitar", "flute", False)),
    ("cinematic|epic|orchestral|orchestra|classical|symphony", _Style(84, "none", "strings", "strings")),
    ("waltz", _Style(138, "none", "piano", "strings")),
    ("pop", _Style(112, "straight", "piano", "synth", False)),
)

_VOICES: tuple[tuple[str, Voice], ...] = (
    ("electric piano|rhodes|wurlitzer", "electric piano"),
    ("piano|keys", "piano"),
    ("guitars?|ukulele|harp|banjo", "guitar"),
    ("strings?|violins?|cellos?|orchestra", "strings"),
    ("flutes?|whistle|clarinet|oboe|saxophone|sax|trumpet", "flute"),
    ("organ|accordion", "organ"),
    ("bells?|celesta|vibraphone|marimba|xylophone|music box", "bells"),
    ("synths?|synthesizer|arpeggio", "synth"),
    ("pads?|choir", "pad"),
)
_LEADING: tuple[Voice, ...] = ("flute", "bells", "strings", "synth", "guitar", "piano")
"""Of two named instruments, the earlier one in this order plays the melody."""

_FAST = "fast|quick|uptempo|upbeat|energetic|driving|lively|allegro|presto|running|workout"
_SLOW = "slow|calm|relaxed|relaxing|gentle|quiet|peaceful|sleepy|soothing|adagio|largo|chill|soft"
_SAD = (
    "sad|dark|melancholic|melancholy|moody|lonely|sorrowful|somber|mournful|gloomy|tense|scary|haunting|rainy"
)
_HAPPY = "happy|joyful|joyous|bright|cheerful|sunny|uplifting|playful|triumphant|hopeful|fun"
_PERCUSSION = "drums?|percussion|beats?|groove"

_PITCH_CLASSES = {"c": 0, "d": 2, "e": 4, "f": 5, "g": 7, "a": 9, "b": 11}
_KEY = re.compile(r"\b([a-g])(?:[ -]?(#|♯|sharp\b|♭|b\b|flat\b))?[ -](major|minor|maj|min)\b")
_BPM = re.compile(r"\b(\d{2,3}) ?bpm\b")
_WITHOUT = re.compile(r"\b(?:no|without|not) (?:any )?([a-z]+)(?: (?:and|or) ([a-z]+))?")
_SLOWEST, _FASTEST = 40.0, 220.0


def read_prompt(prompt: str, rng: np.random.Generator) -> Plan:
    """The plan that the words of `prompt` describe; `rng` decides the rest."""
    text = re.sub(r"\blo[ -]?fi\b", "lofi", prompt.lower())
    text = re.sub(r"\bhip[ -]hop\b", "hiphop", text)
    unwanted = " ".join(word for match in _WITHOUT.finditer(text) for word in match.groups() if word)
    text = _WITHOUT.sub(" ", text)
    style = next((style for words, style in _STYLES if _names(text, words)), _PLAIN)
    # Always draw both, so that an additional word does not change all later draws.
    tonic, minor = int(rng.integers(12)), bool(rng.random() < 0.4)
    tonic, minor = _key(text, tonic, _mode(text, style, minor))
    drums = style.drums
    if _names(text, _SLOW) and drums == "straight":
        drums = "none"
    if _names(text, _PERCUSSION) and drums == "none":
        drums = "soft"
    if _names(unwanted, _PERCUSSION):
        drums = "none"
    chords, melody = _cast(text, unwanted, style)
    return Plan(
        bpm=_tempo(text, style.bpm),
        beats=3 if _names(text, "waltz") else 4,
        tonic=tonic,
        minor=minor,
        chords=chords,
        melody=melody,
        bass=not (_names(unwanted, "bass") or _names(text, "solo|lullaby|music box")),
        drums="none" if _names(text, "solo") and not _names(text, _PERCUSSION) else drums,
        swing=style.swing,
        sevenths=style.sevenths,
    )


def _names(text: str, words: str) -> bool:
    return re.search(rf"\b(?:{words})\b", text) is not None


def _tempo(text: str, usual: float) -> float:
    """Beats per minute: the prompt's number, else the style's, adjusted by words such as slow and fast."""
    if said := _BPM.search(text):
        return min(max(float(said[1]), _SLOWEST), _FASTEST)
    if _names(text, _FAST):
        return max(usual * 1.15, 138.0)
    if _names(text, _SLOW):
        return min(usual * 0.85, 76.0)
    return usual


def _mode(text: str, style: _Style, drawn: bool) -> bool:
    """Whether the piece is in minor."""
    if _names(text, _SAD) != _names(text, _HAPPY):
        return _names(text, _SAD)
    return drawn if style.minor is None else style.minor


def _key(text: str, tonic: int, minor: bool) -> tuple[int, bool]:
    """The tonic and whether it is minor: the key in the prompt, such as `F# minor`, else the arguments."""
    if said := _KEY.search(text):
        shift = {"#": 1, "♯": 1, "sharp": 1, "♭": -1, "b": -1, "flat": -1}.get(said[2], 0)
        return (_PITCH_CLASSES[said[1]] + shift) % 12, said[3].startswith("min")
    if re.search(r"\b(minor|major) key\b|\bin (minor|major)\b", text):
        return tonic, _names(text, "minor")
    return tonic, minor


def _cast(text: str, unwanted: str, style: _Style) -> tuple[Voice, Voice | None]:
    """The instruments of the chords and of the melody."""
    named: list[Voice] = []
    for words, voice in _VOICES:
        if _names(text, words):
            named.append(voice)
            text = re.sub(rf"\b(?:{words})\b", " ", text)
    refused = {voice for words, voice in _VOICES if _names(unwanted, words)}
    chords, melody = style.chords, style.melody
    if len(named) == 1:
        if named[0] in {"flute", "bells"} and style.chords != "bells":
            melody = named[0]
        else:
            chords = named[0]
            melody = named[0] if _names(text, "solo") or melody == named[0] else melody
    elif named:
        lead = min(named, key=_rank)
        melody, chords = lead, next(voice for voice in named if voice != lead)
    if chords in refused:
        chords = next(voice for voice in ("piano", "pad", "guitar") if voice not in refused)
    if melody in refused or _names(unwanted, "melody"):
        melody = None
    return chords, melody


def _rank(voice: Voice) -> int:
    return _LEADING.index(voice) if voice in _LEADING else len(_LEADING)
