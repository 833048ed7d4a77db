"""INFERQ_PRECISION and INFERQ_GPU_MEMORY_FRACTION: what FaceFusion has of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from inferq.consumers.facefusion.engine import load_backend
from inferq.consumers.facefusion.headless import HeadlessBackend
from inferq.consumers.facefusion.precision import pick_swapper
from inferq.consumers.facefusion.settings import FacefusionSettings
from inferq.schemas import InstallationError


def test_facefusion_has_the_precisions_whose_weights_are_there(tmp_path: Path) -> None:
    def pick(precision: Any) -> str | None:
        return pick_swapper(FacefusionSettings(precision=precision), tmp_path)

    assert pick(None) is None
    with pytest.raises(InstallationError, match=r"needs the weights of hyperswap_1a_256, .* force-download"):
        pick("fp16")
    (tmp_path / "inswapper_128_fp16.onnx").touch()
    assert pick("fp16") == "inswapper_128_fp16"
    with pytest.raises(InstallationError, match=f"INFERQ_PRECISION=fp32, but .*{tmp_path} has only fp16:"):
        pick("fp32")
    (tmp_path / "inswapper_128.onnx").touch()
    (tmp_path / "hyperswap_1a_256.onnx").touch()
    assert (pick("fp16"), pick("fp32")) == ("hyperswap_1a_256", "inswapper_128")


def test_an_engine_that_cannot_be_limited_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inferq.consumers.facefusion.engine.gpu_fault", lambda number: None)
    with pytest.raises(
        InstallationError, match="INFERQ_GPU_MEMORY_FRACTION cannot limit FaceFusion"
    ) as caught:
        load_backend(FacefusionSettings(facefusion_backend="facefusion", gpu_memory_fraction=0.5))
    assert caught.value.exit_status == 78


def test_facefusion_is_told_its_face_swapper(home: Path) -> None:
    given: dict[str, Any] = {"home": home, "python": sys.executable, "providers": ["cpu"]}
    backend = HeadlessBackend(**given, swapper="inswapper_128")
    assert (backend.info.model, backend.info.precision) == ("inswapper_128", "fp32")
    command = backend._command(home, "all")
    assert command[command.index("--face-swapper-model") + 1] == "inswapper_128"
    backend = HeadlessBackend(**given)
    assert (backend.info.model, backend.info.precision) == ("face_swapper", None)
    assert "--face-swapper-model" not in backend._command(home, "all")


def test_the_preview_has_one_precision() -> None:
    with pytest.raises(InstallationError, match="the preview has only fp32"):
        load_backend(FacefusionSettings(precision="fp16"))
