"""INFERQ_PRECISION: what each engine has, what it computes in, and who refuses the others."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from inferq.consumers.acestep.engine import load_backend as load_music
from inferq.consumers.acestep.settings import AceStepSettings
from inferq.consumers.engine import Context, Engine, EngineSettings
from inferq.consumers.ner.engine import load_backend as load_ner
from inferq.consumers.ner.settings import NerSettings
from inferq.consumers.ocr.engine import load_backend as load_ocr
from inferq.consumers.ocr.settings import OcrSettings
from inferq.consumers.runtime import child
from inferq.consumers.runtime.channel import Channel
from inferq.schemas import EngineInfo, InstallationError, Task, TaskType, get_type


def test_the_wanted_precision_or_the_engines_own() -> None:
    assert EngineSettings().pick_precision(["bf16", "fp32"], "it") == "bf16"
    assert EngineSettings(precision="fp32").pick_precision(["bf16", "fp32"], "it") == "fp32"
    with pytest.raises(InstallationError) as caught:
        EngineSettings(precision="int8").pick_precision(["bf16", "fp32"], "ACE-Step on cuda")
    assert str(caught.value).startswith("INFERQ_PRECISION=int8, but ACE-Step on cuda has only bf16, fp32:")
    assert caught.value.exit_status == 78
    with pytest.raises(InstallationError, match="INFERQ_PRECISION"):
        EngineSettings.load(precision="half")


@pytest.mark.parametrize(
    ("load", "settings", "only"),
    [
        (load_music, AceStepSettings(precision="bf16"), "the preview has only fp32"),
        (
            load_music,
            AceStepSettings(acestep_backend="diffusers", precision="int8"),
            "ACE-Step on cpu has only fp32, bf16:",
        ),
        (
            load_music,
            AceStepSettings(acestep_backend="diffusers", device="cuda:1", precision="int8"),
            "ACE-Step on cuda:1 has only bf16, fp16, fp32",
        ),
        (load_ner, NerSettings(precision="fp16"), "NER with lac has only fp32"),
        (
            load_ner,
            NerSettings(ner_backend="paddlenlp", device="cuda", precision="fp16"),
            "NER with paddlenlp has only fp32",
        ),
        (load_ocr, OcrSettings(precision="int8"), "RapidOCR has only fp32"),
        (
            load_ocr,
            OcrSettings(ocr_backend="paddleocr", device="cuda", precision="bf16"),
            "PaddleOCR on cuda has only fp32, fp16",
        ),
        (
            load_ocr,
            OcrSettings(ocr_backend="paddleocr", ocr_device="onnxruntime", precision="fp16"),
            "PaddleOCR on onnxruntime has only fp32",
        ),
    ],
)
def test_an_engine_refuses_what_it_does_not_have_and_says_what_it_has(
    load: Callable[[Any], Any], settings: EngineSettings, only: str
) -> None:
    with pytest.raises(InstallationError, match=only) as caught:
        load(settings)
    assert caught.value.code == "bad_settings"


@pytest.mark.parametrize(
    ("cpu", "device", "precision", "config"),
    [
        ("avx512bw", "cpu", None, {"cpu_threads": 2, "run_mode": "mkldnn"}),
        ("avx512bw", "cpu", "bf16", {"cpu_threads": 2, "run_mode": "mkldnn_bf16"}),
        ("avx2", "cpu", "bf16", None),
        ("avx2", "cuda", "fp16", {"run_mode": "paddle_fp16"}),
    ],
)
def test_paddleocr_is_told_the_precision(
    monkeypatch: pytest.MonkeyPatch, cpu: str, device: str, precision: Any, config: dict[str, Any] | None
) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr("inferq.consumers.ocr.paddle._load", lambda given, check: asked.update(given))
    monkeypatch.setattr("inferq.consumers.ocr.paddle.version", lambda _: "0")
    monkeypatch.setattr(Path, "read_text", lambda path, encoding: f"flags: sse {cpu}")
    settings = OcrSettings(ocr_backend="paddleocr", device=device, ocr_threads=2, precision=precision)
    if config is None:
        with pytest.raises(InstallationError, match="PaddleOCR on cpu has only fp32:"):
            load_ocr(settings)
        return
    assert load_ocr(settings).info.precision == (precision or "fp32")
    assert asked["engine_config"] == {"paddle_static": config}


class Pipeline:
    """In AceStepPipeline's place: keeps the number format."""

    is_turbo, sample_rate = True, 48000
    vae = SimpleNamespace(enable_tiling=lambda: None, enable_slicing=lambda: None)
    tokenizer, condition_encoder, transformer = (MagicMock() for _ in range(3))
    dtype: Any = None

    @classmethod
    def from_pretrained(cls, folder: Path, *, dtype: str, **_: Any) -> Pipeline:
        cls.dtype = dtype
        return cls()

    def to(self, place: str) -> None: ...

    def set_progress_bar_config(self, **_: Any) -> None: ...


@pytest.mark.parametrize(
    ("device", "precision", "dtype", "numbers"),
    [
        ("cpu", None, None, "float32"),
        ("cuda", None, None, "bfloat16"),
        ("cuda", "fp16", None, "float16"),
        ("cuda", None, "float16", "float16"),
        ("cuda", "fp16", "float16", "float16"),
        ("cuda", "fp32", "float16", None),
    ],
)
def test_ace_step_computes_in_it_also_under_its_older_setting(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    device: str,
    precision: Any,
    dtype: Any,
    numbers: str | None,
) -> None:
    names = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
    cuda = SimpleNamespace(is_available=lambda: True, device_count=lambda: 1)
    torch = SimpleNamespace(__version__="0", cuda=cuda, **{name: name for name in names})
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "accelerate", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "diffusers", SimpleNamespace(AceStepPipeline=Pipeline))
    monkeypatch.setattr("inferq.consumers.acestep.pipeline.version", lambda _: "0")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "model_index.json").write_text('{"_class_name": "AceStepPipeline"}')
    settings = AceStepSettings(
        acestep_backend="diffusers",
        acestep_model_dir=tmp_path,
        device=device,
        precision=precision,
        acestep_dtype=dtype,
    )
    if numbers is None:
        with pytest.raises(InstallationError, match="leave INFERQ_ACESTEP_DTYPE out"):
            load_music(settings)
        return
    assert load_music(settings).info.precision == names[numbers]
    assert Pipeline.dtype == numbers


class Heedless(Engine[Task]):
    """An engine that does not know of precisions."""

    def load(self) -> EngineInfo:
        return EngineInfo(name="heedless", version="1", model="none", device="cpu")

    def run(self, task: Task, context: Context) -> dict[str, Any]:
        raise NotImplementedError


def test_the_engine_process_refuses_for_an_engine_that_does_not_heed_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("INFERQ_PRECISION", "fp16")
    echo = get_type("echo")
    task_type = TaskType(
        name="echo",
        task=echo.task,
        output=echo.output,
        engine=f"{__name__}:Heedless",
        settings=EngineSettings,
    )
    ours, theirs = socket.socketpair()
    with ours, theirs:
        child._serve(task_type, Channel(theirs))
        answer = ours.recv(65536)
    assert b"INFERQ_PRECISION=fp16, but heedless computes in a precision that it does not name" in answer
    assert b"bad_settings" in answer
    child._check_precision(task_type, Heedless().load().model_copy(update={"precision": "fp16"}))
    monkeypatch.delenv("INFERQ_PRECISION")
    child._check_precision(task_type, Heedless().load())
