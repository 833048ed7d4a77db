"""The diffusers backend around a stand-in for the pipeline: what it is asked, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

from inferq.consumers.acestep import AceStepOutput
from inferq.consumers.acestep.engine import AceStepEngine
from inferq.consumers.acestep.pipeline import DiffusersBackend, offered
from inferq.consumers.engine import TaskAborted
from inferq.schemas import InstallationError, TransientFailure
from tests.acestep.conftest import Runner, acestep_task

PARTS = ("vae", "text_encoder", "tokenizer", "transformer", "condition_encoder", "scheduler")


class StandIn:
    """In AceStepPipeline's place: keeps what it is asked, and gives noise of the generators' seeds."""

    loaded: ClassVar[dict[str, Any]] = {}
    is_turbo = True
    sample_rate = 48000
    shape: tuple[int, ...] | None = None
    bad_piece: int | None = None

    def __init__(self) -> None:
        self.asked: dict[str, Any] = {}
        self.place: Any = None
        self.freed = 0
        self.tiled = False
        self.sliced = False
        self.vae = SimpleNamespace(
            enable_tiling=lambda: setattr(self, "tiled", True),
            enable_slicing=lambda: setattr(self, "sliced", True),
        )
        self.tokenizer = SimpleNamespace(padding_side="left")
        self.condition_encoder = SimpleNamespace(register_forward_hook=lambda _: None)
        self.transformer = SimpleNamespace(layers=[])

    @classmethod
    def from_pretrained(cls, folder: Path, **asked: Any) -> StandIn:
        if "broken" in folder.name:
            raise OSError("bad weights")
        cls.loaded = asked
        return cls()

    def to(self, place: str) -> None:
        self.place = place

    def enable_model_cpu_offload(self, gpu_id: int) -> None:
        self.place = ("offload", gpu_id)

    def set_progress_bar_config(self, **_: Any) -> None: ...

    def maybe_free_model_hooks(self) -> None:
        self.freed += 1

    def __call__(self, *, callback_on_step_end: Callable[..., Any], **asked: Any) -> Any:
        self.asked = asked
        for step in range(asked["num_inference_steps"]):
            assert callback_on_step_end(self, step, 0.5, {}) == {}
        # Like the real one, in whole latents of 1920 frames.
        frames = -(-round(asked["audio_duration"] * 48000) // 1920) * 1920
        if self.shape:
            return SimpleNamespace(audios=np.zeros(self.shape, np.float32))
        noise = [np.random.default_rng(seed).uniform(-0.5, 0.5, (2, frames)) for seed in asked["generator"]]
        if self.bad_piece is not None:
            noise[self.bad_piece][:] = np.nan
        return SimpleNamespace(audios=np.array(noise, np.float32))


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    """torch with two GPUs, and the pipeline's stand-in."""
    torch = SimpleNamespace(
        __version__="0",
        cuda=SimpleNamespace(is_available=lambda: True, device_count=lambda: 2),
        Generator=lambda device: SimpleNamespace(manual_seed=lambda seed: seed if device == "cpu" else None),
        **{name: name for name in ("float32", "bfloat16", "float16")},
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "accelerate", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "diffusers", SimpleNamespace(AceStepPipeline=StandIn))
    monkeypatch.setattr("inferq.consumers.acestep.pipeline.version", lambda _: "0")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return StandIn


def weights(folder: Path, *, name: str = "weights", without: str = "", kind: str = "AceStepPipeline") -> Path:
    root = folder / name
    index: dict[str, Any] = {"_class_name": kind, "_diffusers_version": "0", "audio_tokenizer": [None, None]}
    for part in PARTS:
        index[part] = ["diffusers", "Any"]
        if part != without:
            (root / part).mkdir(parents=True)
    (root / "model_index.json").write_text(json.dumps(index))
    return root


def backend(
    folder: Path | None, *, device: str = "cpu", precision: Any = None, **more: Any
) -> DiffusersBackend:
    return DiffusersBackend(
        model_dir=folder,
        device=device,
        precision=precision or offered(device)[0],
        cpu_offload=more.get("cpu_offload", False),
    )


def engine_with(loaded: DiffusersBackend) -> AceStepEngine:
    engine = AceStepEngine()
    engine._loaded = loaded
    return engine


def test_the_task_reaches_the_pipeline(stand_in: type[StandIn], tmp_path: Path, run: Runner) -> None:
    loaded = backend(weights(tmp_path))
    made = run(engine_with(loaded), acestep_task("calm piano", duration=1.01, seed=7))
    asked = loaded._pipeline.asked
    assert (asked["prompt"], asked["lyrics"], asked["audio_duration"]) == (["calm piano"], [""], 1.01)
    assert (asked["num_inference_steps"], asked["guidance_scale"], asked["generator"]) == (8, 1.0, [7])
    assert len(made.sound) == 48480
    assert (made.output.preview, made.output.ai) == (False, True)
    assert loaded._pipeline.tiled
    assert loaded._pipeline.sliced
    run(engine_with(loaded), acestep_task(lyrics=" la\nla ", options={"steps": 3, "guidance": 4}))
    asked = loaded._pipeline.asked
    assert (asked["lyrics"], asked["num_inference_steps"], asked["guidance_scale"]) == (["la\nla"], 3, 1.0)


def test_other_weights_take_more_steps_and_guidance(
    stand_in: type[StandIn], tmp_path: Path, run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StandIn, "is_turbo", False)
    loaded = backend(weights(tmp_path))
    run(engine_with(loaded), acestep_task())
    assert (loaded._pipeline.asked["num_inference_steps"], loaded._pipeline.asked["guidance_scale"]) == (
        50,
        7,
    )
    run(engine_with(loaded), acestep_task(options={"guidance": 1}))
    assert loaded._pipeline.asked["guidance_scale"] == 1


def test_tasks_of_one_length_are_made_together_and_sound_as_if_alone(
    stand_in: type[StandIn], tmp_path: Path, run: Runner
) -> None:
    loaded = backend(weights(tmp_path), device="gpu")
    engine = engine_with(loaded)
    tasks = [
        acestep_task("calm piano", duration=1, seed=1),
        acestep_task("loud drums", duration=1, seed=2, lyrics="la la", options={"format": "flac"}),
        acestep_task("slow strings", duration=1, seed=None),
    ]
    reports: list[list[tuple[float, str]]] = [[], [], []]
    contexts = [run.context(told, lambda: False) for told in reports]
    outputs = engine.run_batch(tasks, contexts)
    asked = loaded._pipeline.asked
    assert asked["prompt"] == ["calm piano", "loud drums", "slow strings"]
    assert asked["lyrics"] == ["", "la la", ""]
    for task, context, output, told in zip(tasks, contexts, outputs, reports, strict=True):
        assert isinstance(output, AceStepOutput)
        alone = run(engine, task.model_copy(update={"seed": output.seed}))
        assert output == alone.output
        assert [a.name for a in context.artifacts] == [a.name for a in alone.context.artifacts]
        for artifact, own in zip(context.artifacts, alone.context.artifacts, strict=True):
            assert artifact.path.read_bytes() == own.path.read_bytes()
        assert told == alone.reports


def test_only_short_pieces_of_one_length_go_together(stand_in: type[StandIn], tmp_path: Path) -> None:
    folder = weights(tmp_path)
    loaded = backend(folder, device="gpu")

    def key(**fields: Any) -> Any:
        return loaded.batch_key(acestep_task(**fields))

    assert (loaded.batch_size, backend(folder).batch_size) == (8, 1)
    assert key(duration=75) == key(duration=75, seed=9, options={"steps": 8, "guidance": 3, "format": "mp3"})
    assert key(duration=75) != key(duration=74)
    assert key(duration=75) != key(duration=75, options={"steps": 7})
    assert key(duration=76) != key(duration=76, task_id="another")
    assert key(duration=76) != key(duration=76, tenant="another")
    loaded._pipeline.is_turbo = False
    assert key(duration=75) == key(duration=75, options={"steps": 50, "guidance": 7})
    assert key(duration=75) != key(duration=75, options={"guidance": 3})


def test_a_cancelled_task_and_bad_sound_cost_the_others_nothing(
    stand_in: type[StandIn], tmp_path: Path, run: Runner
) -> None:
    loaded = backend(weights(tmp_path))
    loaded._pipeline.bad_piece = 1
    reports: list[tuple[float, str]] = []
    tasks = [acestep_task(duration=1, seed=seed) for seed in (1, 2, 3)]
    contexts = [
        run.context(reports, lambda: len(reports) > 3),
        run.context([], lambda: False),
        run.context([], lambda: False),
    ]
    cancelled, bad, made = engine_with(loaded).run_batch(tasks, contexts)
    assert isinstance(cancelled, TaskAborted)
    assert isinstance(bad, TransientFailure)
    assert bad.code == "bad_audio"
    assert isinstance(made, AceStepOutput)
    assert made.seed == 3


def test_a_batch_whose_tasks_are_all_cancelled_stops_at_the_next_step(
    stand_in: type[StandIn], tmp_path: Path, run: Runner
) -> None:
    reports: list[tuple[float, str]] = []
    contexts = [run.context(reports, lambda: len(reports) > 3) for _ in range(2)]
    loaded = backend(weights(tmp_path))
    with pytest.raises(TaskAborted):
        engine_with(loaded).run_batch([acestep_task(), acestep_task()], contexts)
    assert reports[-1][1] == "step 1 of 8"
    assert loaded._pipeline.freed == 1


def test_weights_are_read_from_the_folder_and_nowhere_else(stand_in: type[StandIn], tmp_path: Path) -> None:
    loaded = backend(weights(tmp_path))
    assert stand_in.loaded == {"local_files_only": True, "use_safetensors": True, "dtype": "float32"}
    assert (loaded.info.model, loaded.info.device) == ("weights", "cpu (float32)")


def test_the_gpu_asked_for_is_the_gpu_used(stand_in: type[StandIn], tmp_path: Path) -> None:
    folder = weights(tmp_path)
    loaded = backend(folder, device="cuda:1")
    assert loaded._pipeline.place == "cuda:1"
    assert stand_in.loaded["dtype"] == "bfloat16"
    assert backend(folder, device="gpu", precision="fp16").info.device == "cuda:0 (float16)"
    offloaded = backend(folder, device="cuda:1", cpu_offload=True)
    assert offloaded._pipeline.place == ("offload", 1)
    assert offloaded.info.device == "cuda:1 (bfloat16, offloaded)"
    with pytest.raises(InstallationError, match="INFERQ_DEVICE=cuda:2, but torch 0 finds 2 GPUs") as caught:
        backend(folder, device="cuda:2")
    assert caught.value.code == "device_unavailable"


def test_offloading_without_a_gpu_is_an_error(stand_in: type[StandIn], tmp_path: Path) -> None:
    with pytest.raises(InstallationError, match="INFERQ_ACESTEP_CPU_OFFLOAD"):
        backend(weights(tmp_path), cpu_offload=True)


def test_a_cancelled_run_stops_at_the_next_step_and_frees_the_gpu(
    stand_in: type[StandIn], tmp_path: Path, run: Runner
) -> None:
    loaded = backend(weights(tmp_path))
    reports: list[tuple[float, str]] = []
    context = run.context(reports, lambda: len(reports) > 3)
    with pytest.raises(TaskAborted):
        engine_with(loaded).run(acestep_task(), context)
    assert reports[-1][1] == "step 3 of 8"
    assert loaded._pipeline.freed == 1


@pytest.mark.parametrize("shape", [(1, 1, 96000), (2, 2, 96000), (1, 2, 95999), (2, 96000)])
def test_sound_of_another_shape_is_no_result(
    stand_in: type[StandIn], tmp_path: Path, run: Runner, shape: tuple[int, ...]
) -> None:
    loaded = backend(weights(tmp_path))
    loaded._pipeline.shape = shape
    with pytest.raises(TransientFailure, match="shape") as caught:
        run(engine_with(loaded), acestep_task())
    assert caught.value.code == "bad_audio"


def test_weights_of_another_rate_are_refused(
    stand_in: type[StandIn], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StandIn, "sample_rate", 44100)
    with pytest.raises(InstallationError, match="44100 Hz"):
        backend(weights(tmp_path))


def test_weights_that_do_not_load_are_said(stand_in: type[StandIn], tmp_path: Path) -> None:
    with pytest.raises(InstallationError, match="bad weights") as caught:
        backend(weights(tmp_path, name="broken"))
    assert caught.value.code == "engine_not_loadable"


def test_missing_weights_are_said(tmp_path: Path) -> None:
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "model_index.json").write_text("[]")
    for folder, complaint in (
        (None, "needs INFERQ_ACESTEP_MODEL_DIR"),
        (tmp_path / "nowhere", r"nowhere has no readable model_index\.json"),
        (tmp_path / "list", r"list has no readable model_index\.json"),
        (weights(tmp_path, name="partial", without="vae"), "partial is incomplete: vae is missing"),
        (weights(tmp_path, name="picture", kind="FluxPipeline"), "holds the weights of a FluxPipeline"),
    ):
        with pytest.raises(InstallationError, match=complaint) as caught:
            backend(folder)
        assert caught.value.code == "bad_model_dir"


def test_missing_packages_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("diffusers") is not None:
        monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.setenv("INFERQ_ACESTEP_BACKEND", "diffusers")
    monkeypatch.setenv("INFERQ_ACESTEP_MODEL_DIR", str(weights(tmp_path)))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InstallationError, match="INFERQ_ACESTEP_BACKEND=preview") as caught:
        AceStepEngine().load()
    assert caught.value.code == "engine_not_installed"
