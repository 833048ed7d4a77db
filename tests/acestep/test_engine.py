"""Music tasks run the way a worker runs them, by the default backend."""

from __future__ import annotations

import gc
import threading
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from inferq.consumers.acestep import AceStepTask
from inferq.consumers.acestep.backend import Audio
from inferq.consumers.acestep.engine import AceStepEngine
from inferq.consumers.acestep.waveform import Waveform, _marks
from inferq.consumers.engine import Context, TaskAborted
from inferq.consumers.runtime.messages import Done
from inferq.consumers.runtime.process import EngineProcess, RunAborted, RunHooks
from inferq.schemas import EngineInfo, InstallationError, TransientFailure
from tests.acestep.conftest import Runner, acestep_task


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3"])
@pytest.mark.parametrize("duration", [1, 2.34567, 7.1])
def test_the_file_has_exactly_the_duration(
    preview: AceStepEngine, run: Runner, suffix: str, duration: float
) -> None:
    made = run(preview, acestep_task("techno with drums", duration=duration, options={"format": suffix}))
    info = soundfile.info(made.path(f"audio.{suffix}"))
    # An MP3 says in its header how much of its first and last frames is padding.
    assert info.frames == round(duration * 48000)
    assert (info.samplerate, info.channels) == (48000, 2)
    assert made.output.duration == round(duration * 48000) / 48000
    assert (made.output.sample_rate, made.output.channels) == (48000, 2)
    assert (made.output.preview, made.output.ai, made.output.seed) == (True, False, 1)
    assert [(a.name, a.content_type) for a in made.context.artifacts] == [
        (f"audio.{suffix}", {"wav": "audio/wav", "flac": "audio/flac", "mp3": "audio/mpeg"}[suffix]),
        ("waveform.png", "image/png"),
    ]


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3"])
def test_the_peak_is_told_and_stays_below_full_scale(
    preview: AceStepEngine, run: Runner, suffix: str
) -> None:
    made = run(preview, acestep_task("fast rock with drums", duration=10, options={"format": suffix}))
    peak = float(np.abs(made.sound).max())
    assert peak < 1
    assert made.output.peak_dbfs < -1
    if suffix != "mp3":
        assert 20 * np.log10(peak) == pytest.approx(made.output.peak_dbfs, abs=0.02)


def test_a_seed_is_drawn_told_and_makes_the_same_again(preview: AceStepEngine, run: Runner) -> None:
    one, two = (run(preview, acestep_task(seed=None)) for _ in range(2))
    assert one.output.seed != two.output.seed
    assert not np.array_equal(one.sound, two.sound)
    again = run(preview, acestep_task(seed=one.output.seed))
    assert again.path("audio.wav").read_bytes() == one.path("audio.wav").read_bytes()
    assert again.output == one.output


def test_progress_rises_to_the_end(preview: AceStepEngine, run: Runner) -> None:
    fractions = [fraction for fraction, _ in run(preview, acestep_task(duration=20)).reports]
    assert fractions == sorted(fractions)
    assert len(fractions) > 10
    assert fractions[-1] == 1


def test_a_run_stops_between_blocks(preview: AceStepEngine, run: Runner) -> None:
    asked = 0

    def abort() -> bool:
        nonlocal asked
        asked += 1
        return asked > 5

    reports: list[tuple[float, str]] = []
    with pytest.raises(TaskAborted):
        preview.run(acestep_task(duration=600), run.context(reports, abort))
    assert reports[-1][0] < 0.02


def test_the_picture_shows_both_channels_over_time(preview: AceStepEngine, run: Runner) -> None:
    made = run(preview, acestep_task("happy pop with drums", duration=12))
    with Image.open(made.path("waveform.png")) as image:
        assert image.format == "PNG"
        assert image.width >= 1200
        assert 300 < image.height < 800
        pixels = np.asarray(image.convert("RGB")).astype(int)
    blue = (pixels[:, :, 2] - pixels[:, :, 0]) > 40
    columns = blue.any(axis=0)
    assert columns.sum() > 1150
    upper, lower = blue[: image.height // 2], blue[image.height // 2 :]
    assert upper.any()
    assert lower.any()


def test_the_picture_reaches_as_far_as_the_sound(tmp_path: Path) -> None:
    frames = 48000
    sound = np.zeros((frames, 2), np.float32)
    sound[: frames // 2, 0] = np.sin(np.arange(frames // 2)) * 0.5
    waveform = Waveform(frames)
    for begin in range(0, frames + 5000, 5000):
        waveform.add(sound[begin : begin + 5000])
    waveform.add(sound[:100])  # beyond the end
    assert waveform._high[:600, 0] == pytest.approx(0.5, abs=0.01)
    assert waveform._low[:600, 0] == pytest.approx(-0.5, abs=0.01)
    assert not waveform._high[601:, 0].any()
    assert not waveform._high[:, 1].any()
    assert waveform._counts.sum() == frames
    assert np.sqrt(waveform._squares[:599, 0] / waveform._counts[:599, 0]) == pytest.approx(0.354, abs=0.02)


@pytest.mark.parametrize("duration", [1, 1.5, 10, 59.9, 60, 61, 300, 600])
def test_the_time_axis_has_a_readable_number_of_marks(duration: float) -> None:
    marks = _marks(duration)
    assert 5 <= len(marks) <= 13
    assert marks[0] == 0
    assert marks[-1] <= duration


def test_runs_leave_no_files_no_threads_and_no_memory(
    preview: AceStepEngine, run: Runner, tmp_path: Path
) -> None:
    def once() -> None:
        run(preview, acestep_task("pop with drums", duration=4, options={"format": "flac"}))

    once()
    descriptors = Path("/proc/self/fd")
    open_files = len(list(descriptors.iterdir())) if descriptors.exists() else 0
    threads = threading.active_count()
    tracemalloc.start()
    try:
        once()
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(3):
            once()
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 200_000
    assert threading.active_count() == threads
    if open_files:
        # Fewer, where the garbage of an earlier test was closed meanwhile.
        assert len(list(descriptors.iterdir())) <= open_files
    for number in range(1, run.count + 1):
        left = {path.name for path in (tmp_path / str(number)).rglob("*") if path.is_file()}
        assert left == {"audio.flac", "waveform.png"}


def test_memory_does_not_grow_with_the_duration(preview: AceStepEngine, run: Runner) -> None:
    def most(duration: float) -> int:
        tracemalloc.start()
        try:
            reports: list[tuple[float, str]] = []
            task = acestep_task("solo flute", duration=duration, options={"format": "flac"})
            preview.run(task, run.context(reports, lambda: False))
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    most(5)
    assert most(120) < most(20) + 10_000_000  # 100 s more would be 38 MB


def test_it_loads_and_says_what_it_is() -> None:
    engine = AceStepEngine()
    info = engine.load()
    assert (info.name, info.model, info.device) == ("preview", "none", "cpu")
    engine.warm_up()
    engine.close()
    with pytest.raises(RuntimeError, match="is not loaded"):
        engine.warm_up()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("INFERQ_ACESTEP_BACKEND", "midi"),
        ("INFERQ_DEVICE", "tpu"),
        ("INFERQ_ACESTEP_DTYPE", "int8"),
        ("INFERQ_ACESTEP_CPU_OFFLOAD", "perhaps"),
    ],
)
def test_a_setting_that_means_nothing_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(InstallationError, match=name):
        AceStepEngine()


def test_a_worker_runs_it_and_stops_it(tmp_path: Path) -> None:
    """In the engine process that a worker starts, by the type's entry point."""
    engine = EngineProcess("acestep")
    engine.spawn()
    try:
        engine.wait_ready(limit=60)
        watch = RunHooks(lambda *_: None, lambda: None)
        body = acestep_task().body().decode()
        answer = engine.run(body, str(tmp_path / "1"), {}, watch=watch, time_limit=60, abort_grace=30)
        assert isinstance(answer, Done)
        assert set(answer.artifacts) == {"audio.wav", "waveform.png"}
        assert answer.artifacts["audio.wav"].bytes == 2 * 48000 * 4 + 44
        begun: list[float] = []
        stop = RunHooks(lambda fraction, _: begun.append(fraction), lambda: "cancelled" if begun else None)
        body = acestep_task(duration=600).body().decode()
        with pytest.raises(RunAborted):
            engine.run(body, str(tmp_path / "2"), {}, watch=stop, time_limit=60, abort_grace=30)
        assert max(begun) < 0.5
        assert engine.alive
    finally:
        engine.close()


class Fixed:
    """A backend that gives what it was given."""

    ai = True
    batch_size = 1

    def __init__(self, *blocks: Audio) -> None:
        self.info = EngineInfo(name="fixed", version="1", model="none", device="cpu")
        self._blocks = blocks

    def batch_key(self, task: AceStepTask) -> None:
        return None

    def compose(
        self, tasks: Sequence[AceStepTask], seeds: Sequence[int], contexts: Sequence[Context]
    ) -> list[Iterator[Audio]]:
        return [iter(self._blocks) for _ in tasks]


def engine_with(*blocks: Audio) -> AceStepEngine:
    engine = AceStepEngine()
    engine._loaded = Fixed(*blocks)
    return engine


def test_any_backend_will_do(run: Runner) -> None:
    loud = np.full((48000, 2), 1.5, np.float32)
    made = run(engine_with(loud[:1000], loud[1000:]), acestep_task(duration=1))
    assert (made.output.preview, made.output.ai) == (False, True)
    assert made.output.peak_dbfs == -1.0
    assert np.abs(made.sound).max() == pytest.approx(10 ** (-1 / 20), abs=1e-4)


def test_silence_has_a_peak_that_json_can_hold(run: Runner) -> None:
    made = run(engine_with(np.zeros((48000, 2), np.float32)), acestep_task(duration=1))
    assert made.output.peak_dbfs == -120.0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_sound_is_no_result(run: Runner, bad: float) -> None:
    broken = np.zeros((48000, 2), np.float32)
    broken[7, 1] = bad
    with pytest.raises(TransientFailure, match="not finite numbers") as caught:
        run(engine_with(broken), acestep_task(duration=1))
    assert caught.value.code == "bad_audio"


def test_a_piece_that_is_too_short_is_no_result(run: Runner) -> None:
    with pytest.raises(TransientFailure, match="47999 frames instead of 48000"):
        run(engine_with(np.zeros((47999, 2), np.float32)), acestep_task(duration=1))
