"""Writes the preview's score: chords, bass, melody and drums, in phrases of four bars, with an ending."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from inferq.consumers.acestep.backend import SAMPLE_RATE
from inferq.consumers.acestep.mixer import Note
from inferq.consumers.acestep.plan import Plan

_MAJOR, _MINOR = (0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10)
_PHRASE = 4
"""Bars in a phrase: one run through the chords."""

# Chords as degrees of the scale, one per bar; 0 is the tonic.
_PROGRESSIONS = {
    (False, False): ((0, 4, 5, 3), (0, 5, 3, 4), (0, 3, 0, 4), (0, 2, 3, 4), (5, 3, 0, 4)),
    (True, False): ((0, 5, 2, 6), (0, 3, 5, 6), (0, 6, 5, 6), (0, 2, 6, 3)),
    (False, True): ((1, 4, 0, 5), (0, 5, 1, 4), (3, 2, 1, 0)),
    (True, True): ((0, 3, 6, 2), (5, 6, 0, 0), (3, 4, 0, 5)),
}
_RHYTHMS = {
    3: (((0, 2), (2, 1)), ((0, 1), (1, 1), (2, 1)), ((0, 1.5), (1.5, 0.5), (2, 1)), ((0, 3),)),
    4: (
        ((0, 1), (1, 1), (2, 2)),
        ((0, 1.5), (1.5, 0.5), (2, 1), (3, 1)),
        ((0, 2), (2, 1), (3, 0.5), (3.5, 0.5)),
        ((0.5, 0.5), (1, 1), (2.5, 0.5), (3, 1)),
        ((0, 0.5), (0.5, 0.5), (1, 1), (2, 1.5)),
        ((0, 3),),
    ),
}
"""Rhythms of a bar of melody: start and length of its notes, in beats."""

_MOVES = (-2, -2, -1, -1, -1, -1, 0, 1, 1, 1, 2, 3)
"""The steps of the scale between two notes of a melody; each entry has the same probability."""

_GAINS = {
    "piano": 0.3,
    "electric piano": 0.21,
    "guitar": 0.26,
    "strings": 0.14,
    "pad": 0.16,
    "organ": 0.13,
    "synth": 0.2,
    "flute": 0.2,
    "bells": 0.3,
}
"""The gain of each instrument for a note of a chord."""
_LEAD = {"strings": 1.5, "pad": 1.5, "organ": 1.5, "flute": 1.0, "bells": 1.2}
"""The additional gain of each instrument for a melody; 1.4 for all others."""
_HELD = {"strings", "pad", "organ"}
"""Instruments that sustain a chord instead of repeating it."""


@dataclass(frozen=True)
class _Section:
    """The parts that play in a phrase, and the melody's theme."""

    drums: bool
    bass: bool
    melody: bool
    theme: int


@dataclass(frozen=True)
class _Tone:
    """A note of a theme: its position in the phrase (bar, beat), its length (beats), its degree of the scale."""

    bar: int
    beat: float
    beats: float
    step: int


def write_score(plan: Plan, frames: int, rng: np.random.Generator) -> list[Note]:
    """The notes of a piece of `frames` frames. All start and end within the piece."""
    return list(_Writer(plan, frames, rng).notes())


class _Writer:
    def __init__(self, plan: Plan, frames: int, rng: np.random.Generator) -> None:
        self._plan = plan
        self._frames = frames
        self._rng = rng
        self._beat = 60.0 / plan.bpm * SAMPLE_RATE
        self._bar = self._beat * plan.beats
        self._scale = _MINOR if plan.minor else _MAJOR
        choices = _PROGRESSIONS[plan.minor, plan.sevenths]
        self._progression = choices[int(rng.integers(len(choices)))]
        self._arpeggio = bool(rng.random() < 0.5) or plan.bpm < 80
        self._themes = [self._write_theme(), self._write_theme()]

    def notes(self) -> Iterator[Note]:
        # The last chord gets at least one bar, and decays.
        bars = max(0, int(self._frames / self._bar) - 1)
        phrases = -(-bars // _PHRASE)
        previous: Sequence[int] = ()
        for bar in range(bars):
            section = _section(bar // _PHRASE, phrases)
            degree = self._progression[bar % _PHRASE]
            chord = self._voice_chord(degree, previous)
            previous = chord
            yield from self._play_chord(bar, chord)
            if section.bass and self._plan.bass:
                yield from self._play_bass(bar, degree)
            if section.melody:
                yield from self._play_melody(bar, section.theme, degree)
            if section.drums:
                yield from self._play_drums(bar, fill=bar % _PHRASE == _PHRASE - 1 and bar < bars - 1)
        yield from self._end(bars, self._voice_chord(0, previous))

    def _pitch(self, degree: int, octave: int) -> int:
        """The MIDI number of a degree of the scale, counted from the tonic; C in octave 5 is 60."""
        return 12 * octave + self._plan.tonic + self._scale[degree % 7] + 12 * (degree // 7)

    def _low(self, degree: int) -> int:
        """The degree's pitch in the bass's range: from G sharp 1 to G 2 (52 to 98 Hz)."""
        pitch = self._pitch(degree, 3)
        return pitch - 12 * max(0, -(-(pitch - 43) // 12))

    def _voice_chord(self, degree: int, previous: Sequence[int]) -> tuple[int, ...]:
        """The chord's pitches around middle C, as near to the previous chord as possible."""
        size = 4 if self._plan.sevenths else 3
        around = float(np.mean(previous)) if previous else 60.0
        pitches = []
        for third in range(size):
            pitch = self._pitch(degree + 2 * third, 4)
            pitches.append(pitch - 12 * round((pitch - (0.7 * around + 0.3 * 60)) / 12))
        return tuple(sorted(pitches))

    def _note(
        self, bar: int, beat: float, beats: float, voice: str, pitch: float, gain: float, **room: float
    ) -> Iterator[Note]:
        """A note, if it is within the piece. Its start and its gain vary at random, as a human player's do."""
        swing = self._plan.swing if beat % 1 == 0.5 else 0.0
        start = bar * self._bar + (beat + swing) * self._beat + self._rng.normal(0, 0.003) * SAMPLE_RATE
        start = max(0, round(start))
        held = min(round(beats * self._beat), self._frames - start)
        if held > 0:
            yield Note(start, held, voice, pitch, gain * self._rng.uniform(0.88, 1.0), **room)

    def _play_chord(self, bar: int, chord: Sequence[int]) -> Iterator[Note]:
        voice, beats = self._plan.chords, self._plan.beats
        gain = _GAINS[voice]
        if voice in _HELD:
            for place, pitch in enumerate(chord):
                pan = (place - (len(chord) - 1) / 2) * 0.3
                # Two slightly detuned copies sound wider.
                for side, cents in ((-0.4, -4), (0.4, 4)):
                    yield from self._note(
                        bar, 0, beats, voice, pitch + cents / 100, 0.7 * gain, pan=pan + side, echo=0.35
                    )
        elif voice == "bells" or (self._arpeggio and voice in {"piano", "guitar", "synth"}):
            order = [0, 1, 2, 1] if voice == "guitar" else [0, 1, 2, len(chord) - 1, 1, 2]
            for eighth in range(2 * beats):
                up = 12 if voice == "bells" or (eighth % 4 == 3 and len(chord) == 3) else 0
                place = order[eighth % len(order)]
                accent = 1.0 if eighth % 2 == 0 else 0.8
                yield from self._note(
                    bar, eighth / 2, 1.5, voice, chord[place] + up, gain * accent, pan=0.15 * (place - 1)
                )
            yield from self._note(bar, 0, beats, voice, chord[0] - 12, 0.8 * gain, pan=-0.1)
        else:
            strikes = {3: ((0, 1), (1, 0.8), (2, 0.8))}.get(beats, ((0, 1.5), (1.5, 1.5), (3, 1)))
            for number, (beat, length) in enumerate(strikes):
                for place, pitch in enumerate(chord):
                    strum = 0.02 * place if voice == "guitar" else 0.0
                    yield from self._note(
                        bar, beat + strum, length, voice, pitch, gain * (0.8 if number else 0.95),
                        pan=0.2 * (place - 1), echo=0.22,
                    )  # fmt: skip

    def _play_bass(self, bar: int, degree: int) -> Iterator[Note]:
        beats, drums = self._plan.beats, self._plan.drums
        root = self._low(degree)
        fifth = root + self._pitch(degree + 4, 3) - self._pitch(degree, 3)
        if drums == "four on the floor":
            line = [(beat + 0.5, 0.45, root) for beat in range(beats)]
        elif drums == "rock":
            line = [(eighth / 2, 0.48, root) for eighth in range(2 * beats)]
        elif self._plan.sevenths and self._plan.bpm > 90:
            below = self._pitch(degree, 3) - root
            walk = [self._pitch(degree + step, 3) - below for step in (0, 2, 4, 5)]
            line = [(float(beat), 0.95, walk[beat % 4]) for beat in range(beats)]
        elif drums == "none":
            line = [(0.0, float(beats), root)]
        else:
            line = [(0.0, 1.4, root), (1.5, 0.5, root), (2.0, beats - 2.0, fifth if bar % 2 else root)]
        for beat, length, pitch in line:
            yield from self._note(bar, beat, length, "bass", pitch, 0.3, echo=0.03)

    def _write_theme(self) -> list[_Tone]:
        """Four bars of melody: a motif, the motif again, an answer, and rest."""
        rhythms = _RHYTHMS[self._plan.beats]
        motif, answer, close = (rhythms[int(self._rng.integers(len(rhythms) - 1))] for _ in range(3))
        tones, step = [], int(self._rng.integers(2, 7))
        walk: dict[float, int] = {}
        for bar, rhythm in enumerate((motif, motif, answer, (*close[:2], (self._plan.beats - 1, 1)))):
            for beat, beats in rhythm:
                if bar == 1 and beat in walk:
                    step += walk[beat]  # the motif repeats its steps
                else:
                    move = int(self._rng.choice(_MOVES))
                    move = -abs(move) if step > 9 else abs(move) if step < 1 else move
                    walk[beat] = move
                    step += move
                tones.append(_Tone(bar, beat, beats, step))
        return tones

    def _play_melody(self, bar: int, theme: int, degree: int) -> Iterator[Note]:
        voice = self._plan.melody
        if voice is None:
            return
        gain = _GAINS[voice] * _LEAD.get(voice, 1.4)
        chord = {(degree + third) % 7 for third in (0, 2, 4)}
        octave = 6 if self._plan.tonic < 5 else 5
        for tone in self._themes[theme]:
            if tone.bar != bar % _PHRASE or (tone.beat + tone.beats > self._plan.beats):
                continue
            step = tone.step
            if tone.beat == 0 or tone.beats >= 1.5:
                # Stressed and long notes belong to the chord; others may be passing notes.
                step = min(
                    (near for near in range(step - 3, step + 4) if near % 7 in chord),
                    key=lambda near: abs(near - tone.step),
                )
            pitch = self._pitch(step, octave)
            yield from self._note(bar, tone.beat, 0.95 * tone.beats, voice, pitch, gain, pan=0.12, echo=0.35)

    def _play_drums(self, bar: int, *, fill: bool) -> Iterator[Note]:
        for beat, voice, gain in _pattern(self._plan, fill=fill):
            pan = {"hat": 0.3, "shaker": -0.35}.get(voice, 0.0)
            echo = 0.12 if voice == "snare" else 0.02
            yield from self._note(bar, beat, 0.25, voice, 0, gain, pan=pan, echo=echo)

    def _end(self, bars: int, chord: Sequence[int]) -> Iterator[Note]:
        """The tonic's chord, played as an upward arpeggio, then decaying."""
        voice, left = self._plan.chords, (self._frames - bars * self._bar) / self._beat
        root = self._pitch(0, 3)
        pitches = (root - 12 if root > 57 else root, *chord, chord[0] + 12)
        roll = 0.0 if voice in _HELD else min(0.125, left / 16)
        for place, pitch in enumerate(pitches):
            yield from self._note(
                bars, place * roll, left, voice, pitch, _GAINS[voice],
                pan=0.2 * (place - 2), echo=0.4,
            )  # fmt: skip
        if self._plan.bass:
            yield from self._note(bars, 0, left, "bass", self._low(0), 0.26, echo=0.05)


def _section(phrase: int, phrases: int) -> _Section:
    """The parts of a phrase: an introduction, then verses and choruses in turn, some without drums."""
    if phrases < 3:
        return _Section(drums=True, bass=True, melody=True, theme=phrase % 2)
    if phrase == 0:
        return _Section(drums=False, bass=False, melody=False, theme=0)
    if phrase % 6 == 5 and phrase < phrases - 1:
        return _Section(drums=False, bass=True, melody=True, theme=0)
    return _Section(drums=True, bass=True, melody=phrase % 6 != 4, theme=(phrase // 2) % 2)


def _pattern(plan: Plan, *, fill: bool) -> list[tuple[float, str, float]]:
    """One bar of drums as (beat, drum, gain). With a fill, the snare leads into the next phrase."""
    beats = range(plan.beats)
    if plan.drums == "none":
        return []
    if plan.drums == "soft":
        strokes = [(0.0, "kick", 0.42), (2.0, "kick", 0.34), (plan.beats / 2 + 0.5, "kick", 0.22)]
        strokes += [(float(beat), "snare", 0.16) for beat in beats if beat % 2]
        strokes += [(eighth / 2, "shaker", 0.3 if eighth % 2 else 0.18) for eighth in range(2 * plan.beats)]
        return strokes
    if plan.drums == "four on the floor":
        strokes = [(float(beat), "kick", 0.52) for beat in beats]
        strokes += [(float(beat), "snare", 0.24) for beat in beats if beat % 2]
        strokes += [(beat + 0.5, "hat", 0.34) for beat in beats]
        strokes += [(beat + quarter, "hat", 0.14) for beat in beats for quarter in (0.25, 0.75)]
    else:
        strokes = [(0.0, "kick", 0.5), (1.5, "kick", 0.36), (2.0, "kick", 0.44)]
        if plan.drums == "rock":
            strokes.append((2.5, "kick", 0.4))
        strokes += [
            (float(beat), "snare", 0.36 if plan.drums == "rock" else 0.28) for beat in beats if beat % 2
        ]
        strokes += [(eighth / 2, "hat", 0.2 if eighth % 2 else 0.28) for eighth in range(2 * plan.beats)]
    if fill:
        strokes += [
            (plan.beats - 1 + sixteenth / 4, "snare", 0.14 + 0.05 * sixteenth) for sixteenth in (1, 2, 3)
        ]
    return strokes
