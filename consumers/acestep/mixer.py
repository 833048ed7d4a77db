"""Renders notes as stereo audio, block by block. Notes and echo continue from one block into the next."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from inferq.consumers.acestep.backend import SAMPLE_RATE, Audio
from inferq.consumers.acestep.voices import Wave, render

BLOCK = 1 << 16
"""Frames in a block: 1.4 s. With the room's echo it fits a Fourier transform of size 2^17."""

_ECHO = BLOCK + 1
"""The length of the echo in frames."""
_CEILING = 10 ** (-1 / 20)
"""All samples stay below this: -1 dBFS."""
_KEPT_WAVES = 64
"""Notes recur, so this many rendered notes are cached, tens of megabytes at most."""


@dataclass(frozen=True)
class Note:
    """A note or a drum stroke: its start and its length in frames, its voice, pitch, gain and place in the room.

    `pan` ranges from -1 (left) to 1 (right). `echo` is the share of it that the room echoes, from 0 to 1.
    """

    start: int
    frames: int
    voice: str
    pitch: float
    gain: float
    pan: float = 0.0
    echo: float = 0.2


def mix(notes: Iterable[Note], frames: int, *, block: int = BLOCK) -> Iterator[Audio]:
    """`frames` frames of the notes' audio, in blocks of `block` frames; the last one may be smaller.

    The block size changes the audio by rounding only. Loud audio is compressed softly, not clipped.
    """
    waves = lru_cache(_KEPT_WAVES)(render)
    room = _Room(block)
    waiting = deque(sorted(notes, key=lambda note: note.start))
    sounding: list[tuple[Note, Wave]] = []
    for begin in range(0, frames, block):
        end = min(begin + block, frames)
        while waiting and waiting[0].start < end:
            note = waiting.popleft()
            sounding.append((note, waves(note.voice, note.pitch, note.frames)))
        direct = np.zeros((2, end - begin), np.float32)
        towards_room = np.zeros(end - begin, np.float32)
        for note, wave in sounding:
            first, last = max(note.start, begin), min(note.start + len(wave), end)
            piece = wave[first - note.start : last - note.start] * np.float32(note.gain)
            here = slice(first - begin, last - begin)
            # Equal power panning: a note is as loud at a side as in the middle.
            angle = (note.pan + 1) * np.pi / 4
            direct[0, here] += np.float32(np.cos(angle)) * piece
            direct[1, here] += np.float32(np.sin(angle)) * piece
            towards_room[here] += np.float32(note.echo) * piece
        sounding = [(note, wave) for note, wave in sounding if note.start + len(wave) > end]
        sound = direct + room.answer(towards_room)
        yield np.ascontiguousarray((np.float32(_CEILING) * np.tanh(sound / np.float32(_CEILING))).T)


class _Room:
    """A hall's reverb: convolution with decaying noise, different per channel, by overlap-add."""

    def __init__(self, block: int) -> None:
        self._size = 1 << (block + _ECHO - 2).bit_length()
        self._spectrum = np.fft.rfft(_echo(), self._size)
        self._tail = np.zeros((2, _ECHO - 1), np.float64)

    def answer(self, sound: Wave) -> NDArray[np.float32]:
        """The echo, `(2, frames)`, during the block `sound`, `(frames,)`, including that of earlier blocks."""
        frames = len(sound)
        spectrum = np.fft.rfft(sound, self._size) * self._spectrum
        back = np.fft.irfft(spectrum, self._size)[:, : frames + _ECHO - 1]
        back[:, : _ECHO - 1] += self._tail
        self._tail = back[:, frames:].copy()
        answer: NDArray[np.float32] = back[:, :frames].astype(np.float32)
        return answer


def _echo() -> NDArray[np.float64]:
    """The hall's impulse response, `(2, frames)`: starts after 12 ms, decays by 60 dB in 1.3 s."""
    time = np.arange(_ECHO) / SAMPLE_RATE
    noise = np.random.default_rng(0).standard_normal((2, _ECHO))
    # Walls absorb high frequencies: take a moving average.
    noise = (noise + np.roll(noise, 1, axis=1) + np.roll(noise, 2, axis=1)) / 3
    shape = np.exp(-6.9 / 1.3 * time) * np.clip((time - 0.012) / 0.01, 0, 1)
    shape *= np.clip((time[-1] - time) / 0.1, 0, 1)
    echo = noise * shape
    return np.asarray(echo / np.sqrt(np.square(echo).sum(axis=1, keepdims=True)))
