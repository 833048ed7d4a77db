"""The preview's instruments: each renders one note or one drum stroke."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from inferq.consumers.acestep.backend import SAMPLE_RATE

Wave = NDArray[np.float32]
"""One channel: `(frames,) float32`."""

_HIGHEST = 0.45 * SAMPLE_RATE
"""The highest partial, in Hz. Partials above the Nyquist frequency would alias."""
_RELEASE = {
    "piano": 0.25,
    "electric piano": 0.2,
    "guitar": 0.3,
    "strings": 0.5,
    "pad": 0.9,
    "organ": 0.12,
    "synth": 0.12,
    "flute": 0.15,
    "bells": 1.6,
    "bass": 0.08,
}
"""The release of each instrument: how long a note sounds after its end, in seconds."""


def render(voice: str, pitch: float, frames: int) -> Wave:
    """A note of `frames` frames plus its release; its peak is about 1.

    `pitch` is a MIDI note number (69 is 440 Hz) and may be fractional. Drums ignore both arguments.
    """
    if voice in _STROKES:
        return _STROKES[voice]()
    release = int(_RELEASE[voice] * SAMPLE_RATE)
    time = _time(frames + release)
    hertz = 440.0 * 2.0 ** ((pitch - 69) / 12)
    wave = _NOTES[voice](time, hertz)
    # A squared cosine is smooth at both ends, so a note ends without a click.
    wave[frames:] *= np.cos(np.linspace(0, np.pi / 2, release, dtype=np.float32)) ** 2
    return wave


def _time(frames: int) -> NDArray[np.float64]:
    return np.arange(frames) / SAMPLE_RATE


def _partials(
    phase: NDArray[np.float64], weights: Sequence[float], hertz: float, fading: Wave | None = None
) -> Wave:
    """A sum of sines at integer multiples of `phase`, without those above the highest partial.

    With `fading`, multiple k is multiplied by the k-th power of `fading`, so that high multiples decay faster.
    Each sine costs a tenth of computing it directly: sin(k x) = 2 cos(x) sin((k-1) x) - sin((k-2) x).
    """
    sine = np.sin(phase).astype(np.float32)
    twice = (2 * np.cos(phase)).astype(np.float32)
    before, now = np.zeros_like(sine), sine
    power = fading
    total = np.zeros_like(sine)
    for number, weight in enumerate(weights, start=1):
        if number * hertz > _HIGHEST:
            break
        total += np.float32(weight) * (now if power is None else now * power)
        before, now = now, twice * now - before
        if power is not None and fading is not None:
            power = power * fading
    return total


def _attack(time: NDArray[np.float64], seconds: float) -> Wave:
    """An envelope that rises from 0 to 1 in `seconds`, smooth at both ends."""
    return np.asarray(0.5 - 0.5 * np.cos(np.pi * np.minimum(time / seconds, 1.0)), np.float32)


def _decay(time: NDArray[np.float64], rate: float) -> Wave:
    return np.asarray(np.exp(-rate * time), np.float32)


def _vibrato(time: NDArray[np.float64], hertz: float, depth: float) -> NDArray[np.float64]:
    """The phase of a tone with a 5 Hz vibrato that grows to `depth` radians."""
    sway = np.sin(2 * np.pi * 5.2 * time) * np.minimum(time / 0.5, 1.0)
    phase: NDArray[np.float64] = 2 * np.pi * hertz * time + depth * sway
    return phase


def _piano(time: NDArray[np.float64], hertz: float) -> Wave:
    speed = (hertz / 260.0) ** 0.5  # high strings decay faster
    weights = (0.72, 0.4, 0.2, 0.13, 0.07, 0.05, 0.03, 0.02)
    tone = _partials(2 * np.pi * hertz * time, weights, hertz, _decay(time, 0.7 * speed))
    return tone * _decay(time, 0.5 * speed) * _attack(time, 0.004)


def _electric_piano(time: NDArray[np.float64], hertz: float) -> Wave:
    phase = 2 * np.pi * hertz * time
    strike = 1.1 * np.exp(-5 * time) + 0.25
    tone = np.sin(phase + strike * np.sin(phase))
    if 14 * hertz < _HIGHEST:
        tone += 0.12 * np.sin(14 * phase) * np.exp(-18 * time)  # the hammer
    tremolo = 1 - 0.12 * np.sin(2 * np.pi * 4.6 * time)
    return np.asarray(0.85 * tone * tremolo * np.exp(-1.1 * time), np.float32) * _attack(time, 0.006)


def _guitar(time: NDArray[np.float64], hertz: float) -> Wave:
    weights = (0.6, 0.42, 0.3, 0.2, 0.16, 0.1, 0.08, 0.05, 0.04, 0.03)
    tone = _partials(2 * np.pi * hertz * time, weights, hertz, _decay(time, 2.2))
    return tone * _attack(time, 0.003)


def _strings(time: NDArray[np.float64], hertz: float) -> Wave:
    weights = tuple(0.5 / k**1.25 for k in range(1, 11))
    return _partials(_vibrato(time, hertz, 0.12), weights, hertz) * _attack(time, 0.22)


def _pad(time: NDArray[np.float64], hertz: float) -> Wave:
    weights = (0.7, 0.28, 0.16, 0.06, 0.04)
    swell = np.asarray(0.85 + 0.15 * np.sin(2 * np.pi * 0.31 * time), np.float32)
    return _partials(2 * np.pi * hertz * time, weights, hertz) * swell * _attack(time, 0.6)


def _organ(time: NDArray[np.float64], hertz: float) -> Wave:
    weights = (0.5, 0.35, 0.25, 0.2, 0.0, 0.1, 0.0, 0.1)
    return _partials(_vibrato(time, hertz, 0.05), weights, hertz) * _attack(time, 0.012)


def _synth(time: NDArray[np.float64], hertz: float) -> Wave:
    weights = tuple(0.62 / k for k in range(1, 13))
    tone = _partials(2 * np.pi * hertz * time, weights, hertz, _decay(time, 1.6))
    return tone * _decay(time, 0.8) * _attack(time, 0.005)


def _flute(time: NDArray[np.float64], hertz: float) -> Wave:
    weights = (0.85, 0.16, 0.08, 0.02)
    return _partials(_vibrato(time, hertz, 0.16), weights, hertz) * _attack(time, 0.06)


def _bells(time: NDArray[np.float64], hertz: float) -> Wave:
    tone = np.zeros(len(time))
    for ratio, weight, rate in ((1.0, 0.6, 1.8), (2.76, 0.2, 4.0), (5.4, 0.12, 8.0), (2.0, 0.12, 2.5)):
        if ratio * hertz < _HIGHEST:
            tone += weight * np.sin(2 * np.pi * ratio * hertz * time) * np.exp(-rate * time)
    return tone.astype(np.float32) * _attack(time, 0.002)


def _bass(time: NDArray[np.float64], hertz: float) -> Wave:
    weights = (0.75, 0.28, 0.12, 0.05)
    tone = _partials(2 * np.pi * hertz * time, weights, hertz, _decay(time, 1.2))
    return tone * _decay(time, 0.6) * _attack(time, 0.008)


def _kick() -> Wave:
    time = _time(int(0.28 * SAMPLE_RATE))
    # The pitch falls from 155 to 48 Hz; the phase is its integral.
    phase = 2 * np.pi * (48 * time + 107 / 32 * (1 - np.exp(-32 * time)))
    return _ending(np.sin(phase) * np.exp(-11 * time)) * _attack(time, 0.0015)


def _snare() -> Wave:
    time = _time(int(0.22 * SAMPLE_RATE))
    noise = _hiss(len(time), 1, above=16)
    body = np.sin(2 * np.pi * 186 * time) * np.exp(-26 * time)
    return _ending(0.6 * noise * np.exp(-19 * time) + 0.5 * body) * _attack(time, 0.001)


def _hat() -> Wave:
    time = _time(int(0.07 * SAMPLE_RATE))
    return _ending(0.7 * _hiss(len(time), 2, above=4) * np.exp(-60 * time)) * _attack(time, 0.001)


def _shaker() -> Wave:
    time = _time(int(0.11 * SAMPLE_RATE))
    swing = np.exp(-((time - 0.04) ** 2) / 0.0006)
    return _ending(0.5 * _hiss(len(time), 3, above=6) * swing) * _attack(time, 0.01)


def _hiss(frames: int, number: int, *, above: int) -> NDArray[np.float64]:
    """Band-limited noise, always the same for the same `number`.

    Subtracting a mean over `above` samples removes low frequencies; a mean over three damps the highest.
    """
    noise = np.random.default_rng(number).uniform(-1, 1, frames)
    noise = noise - np.convolve(noise, np.full(above, 1 / above), "same")
    return np.convolve(noise, (0.25, 0.5, 0.25), "same")


def _ending(stroke: NDArray[np.float64]) -> Wave:
    """A stroke that ends at zero."""
    fade = min(len(stroke), 480)
    stroke[-fade:] *= np.linspace(1, 0, fade)
    return stroke.astype(np.float32)


_NOTES: dict[str, Callable[[NDArray[np.float64], float], Wave]] = {
    "piano": _piano,
    "electric piano": _electric_piano,
    "guitar": _guitar,
    "strings": _strings,
    "pad": _pad,
    "organ": _organ,
    "synth": _synth,
    "flute": _flute,
    "bells": _bells,
    "bass": _bass,
}
_STROKES: dict[str, Callable[[], Wave]] = {"kick": _kick, "snare": _snare, "hat": _hat, "shaker": _shaker}
