"""The real AceStepPipeline, with tiny random weights and no network: `make test-engines` runs these."""

from __future__ import annotations

import gc
import importlib.util
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from inferq.consumers.acestep.engine import AceStepEngine
from inferq.consumers.engine import TaskAborted
from inferq.schemas import InstallationError
from tests.acestep.conftest import Runner, acestep_task

pytestmark = [
    pytest.mark.engines,
    # diffusers and transformers warn of their own doings.
    pytest.mark.filterwarnings("default"),
    pytest.mark.skipif(
        importlib.util.find_spec("diffusers") is None, reason="diffusers is not installed: make test-engines"
    ),
]


def make_weights(folder: Path, *, turbo: bool) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        # torch reads it when it is imported: one thread is many times faster on tensors as small as these.
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        from tests.acestep import tiny
    return tiny.make_weights(folder, turbo=turbo)


@pytest.fixture(scope="module")
def turbo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_weights(tmp_path_factory.mktemp("weights") / "tiny-turbo", turbo=True)


@pytest.fixture(autouse=True, scope="module")
def no_network() -> Iterator[None]:
    """Whoever calls out is found."""

    def refuse(*_: Any) -> None:
        raise AssertionError("an engine calls out")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        yield


def load(folder: Path, **variables: str) -> AceStepEngine:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INFERQ_ACESTEP_BACKEND", "diffusers")
        patch.setenv("INFERQ_ACESTEP_MODEL_DIR", str(folder))
        for name, value in variables.items():
            patch.setenv(name, value)
        engine = AceStepEngine()
        engine.load()
    return engine


@pytest.fixture(scope="module")
def engine(turbo: Path) -> AceStepEngine:
    engine = load(turbo)
    engine.warm_up()
    return engine


def test_it_says_what_it_is(turbo: Path) -> None:
    engine = load(turbo)
    info = engine._backend.info
    assert (info.name, info.model, info.device) == ("diffusers", "tiny-turbo", "cpu (float32)")
    assert info.version[0].isdigit()


@pytest.mark.parametrize("duration", [1, 1.01, 2.34567])
@pytest.mark.parametrize("suffix", ["wav", "mp3"])
def test_the_sound_has_exactly_the_duration(
    engine: AceStepEngine, run: Runner, duration: float, suffix: str
) -> None:
    made = run(engine, acestep_task(duration=duration, options={"format": suffix}))
    assert made.sound.shape == (round(duration * 48000), 2)
    assert made.output.duration == round(duration * 48000) / 48000
    assert (made.output.preview, made.output.ai) == (False, True)
    assert made.sound.std() > 0.001
    assert np.abs(made.sound).max() < 1
    assert made.output.peak_dbfs <= -1
    assert made.path("waveform.png").stat().st_size > 1000


def test_longer_sound_is_decoded_in_tiles(engine: AceStepEngine, run: Runner) -> None:
    made = run(engine, acestep_task(duration=21, options={"steps": 1}))
    assert made.sound.shape == (21 * 48000, 2)


def test_seed_prompt_and_lyrics_make_the_sound(engine: AceStepEngine, run: Runner) -> None:
    first = run(engine, acestep_task(seed=5)).sound
    assert np.array_equal(first, run(engine, acestep_task(seed=5)).sound)
    assert not np.array_equal(first, run(engine, acestep_task(seed=6)).sound)
    assert not np.array_equal(first, run(engine, acestep_task("loud drums", seed=5)).sound)
    assert not np.array_equal(first, run(engine, acestep_task(seed=5, lyrics="la la")).sound)
    assert np.array_equal(first, run(engine, acestep_task(seed=5, lyrics="")).sound)


def test_nothing_of_a_long_prompt_or_of_long_lyrics_is_cut_off(engine: AceStepEngine, run: Runner) -> None:
    for texts in ("prompt", "lyrics"):
        size = 2000 if texts == "prompt" else 4096
        one, two = (
            run(engine, acestep_task(**{texts: "x" * (size - 1) + last}, duration=1)).sound for last in "yz"
        )
        assert not np.array_equal(one, two)


def test_progress_never_goes_back(engine: AceStepEngine, run: Runner) -> None:
    reports = run(engine, acestep_task(options={"steps": 6})).reports
    fractions = [fraction for fraction, _ in reports]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1
    assert [note for _, note in reports if note.startswith("step")] == [f"step {n} of 6" for n in range(1, 7)]


def test_a_run_stops_between_steps_and_the_next_is_none_the_worse(engine: AceStepEngine, run: Runner) -> None:
    before = run(engine, acestep_task(seed=9)).sound
    reports: list[tuple[float, str]] = []
    context = run.context(reports, lambda: len(reports) > 2)
    with pytest.raises(TaskAborted):
        engine.run(acestep_task(options={"steps": 50}), context)
    assert reports[-1][1] == "step 2 of 50"
    assert np.array_equal(before, run(engine, acestep_task(seed=9)).sound)


def test_base_weights_are_guided(tmp_path_factory: pytest.TempPathFactory, run: Runner) -> None:
    engine = load(make_weights(tmp_path_factory.mktemp("weights") / "tiny-base", turbo=False))
    options = {"steps": 2, "guidance": 7}
    guided = run(engine, acestep_task(options=options)).sound
    assert not np.array_equal(guided, run(engine, acestep_task(options=options | {"guidance": 1})).sound)
    assert np.array_equal(guided, run(engine, acestep_task(options={"steps": 2})).sound)


@pytest.mark.parametrize("turbo_weights", [True, False])
def test_a_batch_sounds_as_its_tasks_do_alone(
    tmp_path_factory: pytest.TempPathFactory, run: Runner, turbo: Path, *, turbo_weights: bool
) -> None:
    folder = turbo if turbo_weights else make_weights(tmp_path_factory.mktemp("w") / "base", turbo=False)
    engine = load(folder)
    # Texts of different lengths are padded: seen by the model, the padding would change the sound by 0.002 and more.
    tasks = [
        acestep_task("calm piano", seed=1, options={"steps": 4}),
        acestep_task("loud drums, " * 20, seed=2, options={"steps": 4}),
        acestep_task("slow strings", seed=3, lyrics="[verse]\nla la la", options={"steps": 4}),
    ]
    assert len({engine.batch_key(task) for task in tasks}) == 1
    contexts = [run.context([], lambda: False) for _ in tasks]
    outputs = engine.run_batch(tasks, contexts)
    for task, context, output in zip(tasks, contexts, outputs, strict=True):
        alone = run(engine, task)
        assert output == alone.output
        sound, _ = soundfile.read(context.artifacts[0].path)
        # A matrix product of another shape rounds its last bits differently: one step of 16 bits, here and there.
        assert np.abs(sound - alone.sound).max() < 1.01 / 32768


@pytest.mark.parametrize(
    ("name", "value", "dtype"),
    [
        ("INFERQ_ACESTEP_DTYPE", "bfloat16", "bfloat16"),
        ("INFERQ_ACESTEP_DTYPE", "float32", "float32"),
        ("INFERQ_PRECISION", "bf16", "bfloat16"),
    ],
)
def test_it_computes_with_the_numbers_asked_for(
    turbo: Path, run: Runner, name: str, value: str, dtype: str
) -> None:
    engine = load(turbo, **{name: value})
    assert str(engine._backend._pipeline.transformer.dtype) == f"torch.{dtype}"  # type: ignore[attr-defined]
    assert len(run(engine, acestep_task()).sound) == 96000


@pytest.mark.parametrize("device", ["gpu", "cuda", "cuda:7"])
def test_a_gpu_that_is_not_there_is_an_error_and_never_a_slow_cpu(turbo: Path, device: str) -> None:
    import torch

    if torch.cuda.is_available() and device != "cuda:7":
        pytest.skip("there is a GPU")
    with pytest.raises(InstallationError, match=f"INFERQ_DEVICE={device}") as caught:
        load(turbo, INFERQ_DEVICE=device)
    assert caught.value.code == "device_unavailable"


def test_damaged_weights_are_said(tmp_path: Path) -> None:
    folder = make_weights(tmp_path / "damaged", turbo=True)
    weights = next((folder / "transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InstallationError, match="cannot be loaded") as caught:
        load(folder)
    assert caught.value.code == "engine_not_loadable"


def test_weights_that_may_hold_code_are_refused(tmp_path: Path) -> None:
    import torch

    folder = make_weights(tmp_path / "pickled", turbo=True)
    weights = next((folder / "transformer").glob("*.safetensors"))
    torch.save({}, weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(InstallationError, match="cannot be loaded"):
        load(folder)


@pytest.mark.gpu
@pytest.mark.parametrize("offload", ["false", "true"])
def test_it_runs_on_a_gpu(turbo: Path, run: Runner, offload: str) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    engine = load(turbo, INFERQ_DEVICE="cuda", INFERQ_ACESTEP_CPU_OFFLOAD=offload)
    first = run(engine, acestep_task()).sound
    assert np.array_equal(first, run(engine, acestep_task()).sound)
    assert len(first) == 96000


@pytest.mark.gpu
def test_it_keeps_to_its_share_of_the_gpus_memory(turbo: Path, run: Runner) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    engine = load(turbo, INFERQ_DEVICE="cuda", INFERQ_GPU_MEMORY_FRACTION="0.2")
    try:
        assert len(run(engine, acestep_task()).sound) == 96000
        size = torch.cuda.get_device_properties(0).total_memory
        with pytest.raises(torch.cuda.OutOfMemoryError):
            torch.empty(int(0.21 * size), dtype=torch.uint8, device="cuda")
        torch.empty(int(0.1 * size), dtype=torch.uint8, device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_runs_leave_no_tensors_and_no_files(engine: AceStepEngine, run: Runner, tmp_path: Path) -> None:
    import torch

    def tensors() -> int:
        gc.collect()
        return sum(1 for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor))

    def once() -> None:
        run(engine, acestep_task())
        reports: list[tuple[float, str]] = []
        with pytest.raises(TaskAborted):
            engine.run(acestep_task(), run.context(reports, lambda: len(reports) > 1))

    once()
    before = tensors()
    once()
    once()
    assert tensors() <= before
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"audio.wav", "waveform.png"}
