"""Writes audio files block by block, and measures their peak."""

from __future__ import annotations

import math
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import numpy as np
import soundfile

from inferq.consumers.acestep import AudioFormat
from inferq.consumers.acestep.backend import CHANNELS, SAMPLE_RATE, Audio
from inferq.schemas import TransientFailure

CONTENT_TYPES = MappingProxyType({"wav": "audio/wav", "flac": "audio/flac", "mp3": "audio/mpeg"})

_ENCODING: MappingProxyType[AudioFormat, dict[str, Any]] = MappingProxyType(
    {
        "wav": {"format": "WAV", "subtype": "PCM_16"},
        "flac": {"format": "FLAC", "subtype": "PCM_16"},
        "mp3": {
            "format": "MP3",
            "subtype": "MPEG_LAYER_III",
            "bitrate_mode": "VARIABLE",
            "compression_level": 0.0,
        },
    }
)

_LOUDEST = 10 ** (-1 / 20)
"""The highest sample in a file: -1 dBFS, so that players that resample do not clip."""
_MP3_GAIN = 10 ** (-3 / 20)
"""Decoded MP3 overshoots its source by some 2 dB at loud drums, so the source is made 3 dB softer."""
_SILENCE_DBFS = -120.0
"""The peak that silence reports, because JSON has no -inf."""


class AudioFile:
    """A file of 48 kHz stereo audio, open for writing."""

    def __init__(self, path: Path, suffix: AudioFormat) -> None:
        self.frames = 0
        self._peak = 0.0
        self._gain = np.float32(_MP3_GAIN if suffix == "mp3" else 1.0)
        self._file = soundfile.SoundFile(
            path, "w", samplerate=SAMPLE_RATE, channels=CHANNELS, **_ENCODING[suffix]
        )

    def write(self, block: Audio) -> Audio:
        """Append a block, limited to -1 dBFS, for MP3 also 3 dB softer. Gives the block as written.

        Raises TransientFailure (`bad_audio`) for samples that are not numbers.
        """
        if not np.isfinite(block).all():
            raise TransientFailure(
                "the generated audio has samples that are not finite numbers", code="bad_audio"
            )
        block = np.clip(block, -_LOUDEST, _LOUDEST) * self._gain
        self._file.write(block)
        self.frames += len(block)
        self._peak = max(self._peak, float(np.abs(block).max(initial=0.0)))
        return block

    @property
    def peak_dbfs(self) -> float:
        """The loudest sample so far, in decibels below full scale; -120 for silence."""
        return max(round(20 * math.log10(self._peak), 2), _SILENCE_DBFS) if self._peak else _SILENCE_DBFS

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
