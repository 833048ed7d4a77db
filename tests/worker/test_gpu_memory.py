"""How each framework learns its share of a GPU's memory. The frameworks and the driver are stand-ins."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from inferq.consumers import gpu_memory
from inferq.consumers.acestep.engine import load_backend as load_music
from inferq.consumers.acestep.settings import AceStepSettings
from inferq.consumers.engine import EngineSettings
from inferq.consumers.gpu_memory import limit_paddle_memory, onnxruntime_cuda_options, require_room
from inferq.consumers.machine import gpu_memory_bytes
from inferq.consumers.ner.engine import load_backend as load_ner
from inferq.consumers.ner.settings import NerSettings
from inferq.consumers.ocr.engine import load_backend as load_ocr
from inferq.consumers.ocr.settings import OcrSettings
from inferq.consumers.runtime.computing import out_of_memory
from inferq.producer.cli import app
from inferq.schemas import InstallationError, Settings

GIB = 1 << 30
FLAG = "FLAGS_gpu_memory_limit_mb"


@pytest.fixture(autouse=True)
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPU 0 with 80 GiB, and GPU 1 with 40."""
    monkeypatch.setattr(
        gpu_memory, "gpu_fault", lambda number: None if number < 2 else "there is no GPU 2 here"
    )
    monkeypatch.setattr(gpu_memory, "gpu_memory_bytes", lambda number: (80 * GIB, 40 * GIB)[number])
    monkeypatch.setenv(FLAG, "as it was")  # pytest restores it


def engine(device: str = "cuda", **given: Any) -> EngineSettings:
    return EngineSettings(device=device, **given)


def test_the_driver_says_how_much_memory_a_gpu_has(monkeypatch: pytest.MonkeyPatch) -> None:
    class Driver:
        failing = 0

        def cuInit(self, _flags: int) -> int:
            return 0

        def cuDeviceGet(self, device: Any, number: int) -> int:
            device._obj.value = 70 + number
            return 0

        def cuDeviceTotalMem_v2(self, size: Any, device: Any) -> int:
            size._obj.value = device.value * GIB
            return self.failing

    driver = Driver()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    assert gpu_memory_bytes(1) == 71 * GIB
    driver.failing = 101
    with pytest.raises(OSError, match="GPU 1 has: error 101"):
        gpu_memory_bytes(1)


@pytest.mark.parametrize(
    ("slots", "fraction", "room"),
    [(1, 1.0, True), (2, 0.5, True), (3, 1 / 3, True), (10, 0.1, True), (2, 0.51, False), (3, 0.4, False)],
)
def test_slots_take_at_most_the_whole_memory(slots: int, fraction: float, room: bool) -> None:
    engines = [engine(gpu_memory_fraction=fraction)] * slots
    if room:
        require_room(engines)
        return
    with pytest.raises(InstallationError, match=f"^{slots} slots × INFERQ_GPU_MEMORY_FRACTION={fraction}"):
        require_room(engines)


def test_each_gpu_has_room_of_its_own_and_the_cpu_takes_none() -> None:
    share = {"gpu_memory_fraction": 0.6}
    require_room([engine("cuda:0", **share), engine("cuda:1", **share), engine("cpu", **share), None])
    require_room([Settings()] * 3 + [engine()] * 3)
    require_room([engine(**share)] * 3, at_once=1)
    with pytest.raises(InstallationError, match=r"2 slots .* of the memory of GPU 1,"):
        require_room([engine("cuda:0", **share), engine("cuda:1", **share), engine("cuda:1", **share)])
    with pytest.raises(InstallationError, match="2 slots"):
        require_room([engine(**share)] * 3, at_once=2)


@pytest.mark.parametrize("check", [["--check"], []])
def test_a_worker_whose_slots_do_not_fit_does_not_start(check: list[str]) -> None:
    env = {"INFERQ_DEVICE": "cuda:1", "INFERQ_GPU_MEMORY_FRACTION": "0.4", "INFERQ_SLOTS": "3"}
    ended = CliRunner().invoke(app, ["worker", "ocr", *check], env=env)
    assert isinstance(ended.exception, InstallationError)
    assert ended.exception.exit_status == 78
    assert str(ended.exception) == (
        "3 slots × INFERQ_GPU_MEMORY_FRACTION=0.4 would take 1.2 of the memory of GPU 1, and 1 is all of it: set "
        "INFERQ_SLOTS to at most 2, or INFERQ_GPU_MEMORY_FRACTION to at most 0.33"
    )


def test_a_fraction_that_is_none_is_refused() -> None:
    for bad in ("0", "1.1", "-0.5", "half"):
        with pytest.raises(InstallationError, match="INFERQ_GPU_MEMORY_FRACTION"):
            EngineSettings.load(gpu_memory_fraction=bad)


def test_paddle_and_onnxruntime_get_bytes_of_their_gpu() -> None:
    limit_paddle_memory(1, 0.25)
    assert os.environ[FLAG] == str(10 * 1024)
    assert onnxruntime_cuda_options(1, 0.3, sessions=3) == {
        "device_id": 1,
        "gpu_mem_limit": 4 * GIB,
        "arena_extend_strategy": "kSameAsRequested",
    }
    with pytest.raises(InstallationError, match="is for GPU 2, but there is no GPU 2 here") as caught:
        limit_paddle_memory(2, 0.5)
    assert caught.value.code == "device_unavailable"


def test_without_a_fraction_nothing_is_limited() -> None:
    limit_paddle_memory(0, None)
    limit_paddle_memory(None, 0.5)
    assert os.environ[FLAG] == "as it was"
    assert onnxruntime_cuda_options(1, None, sessions=3) == {"device_id": 1}


class Stop(Exception):
    """Raised by a stand-in that has seen what it is for."""


def test_torch_is_limited_before_it_loads_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said: list[tuple[float, str]] = []
    cuda = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 2,
        set_per_process_memory_fraction=lambda fraction, device: said.append((fraction, device)),
    )
    torch = SimpleNamespace(__version__="0", cuda=cuda, bfloat16="bfloat16", float32="float32")

    class Pipeline:
        @staticmethod
        def from_pretrained(*_: Any, **__: Any) -> None:
            raise Stop

    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "accelerate", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "diffusers", SimpleNamespace(AceStepPipeline=Pipeline))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "model_index.json").write_text('{"_class_name": "AceStepPipeline"}')
    for device, fraction in (("cuda:1", 0.4), ("cpu", 0.4), ("cuda:0", None)):
        with pytest.raises(Stop):
            load_music(
                AceStepSettings(
                    acestep_backend="diffusers",
                    acestep_model_dir=tmp_path,
                    device=device,
                    gpu_memory_fraction=fraction,
                )
            )
    assert said == [(0.4, "cuda:1")]


@pytest.fixture
def paddle(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """What the flag was when paddle was first asked for its devices, with paddle's import just before it."""
    seen: list[str | None] = []

    def count() -> int:
        seen.append(os.environ.get(FLAG))
        raise Stop

    device = SimpleNamespace(is_compiled_with_cuda=lambda: True, cuda=SimpleNamespace(device_count=count))
    monkeypatch.setitem(sys.modules, "paddle", SimpleNamespace(device=device, __version__="0"))
    monkeypatch.setitem(sys.modules, "paddleocr", SimpleNamespace(PaddleOCR=None))
    return seen


def test_paddle_is_limited_before_it_is_imported(paddle: list[str | None]) -> None:
    share = {"device": "cuda:1", "gpu_memory_fraction": 0.5}
    with pytest.raises(Stop):
        load_ocr(OcrSettings(ocr_backend="paddleocr", **share))
    with pytest.raises(Stop):
        load_ner(NerSettings(ner_backend="paddlenlp", **{**share, "gpu_memory_fraction": 0.25}))
    assert paddle == [str(20 * 1024), str(10 * 1024)]


def test_paddleocr_on_onnxruntime_limits_its_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    monkeypatch.setattr("inferq.consumers.ocr.paddle._load", lambda given, check: asked.update(given))
    monkeypatch.setattr("inferq.consumers.ocr.paddle.version", lambda _: "0")
    settings = {"ocr_backend": "paddleocr", "ocr_device": "onnxruntime", "device": "cuda:1"}
    load_ocr(OcrSettings(**settings, ocr_threads=2, gpu_memory_fraction=0.3))
    assert asked["engine_config"] == {
        "intra_op_num_threads": 2,
        "provider_options": onnxruntime_cuda_options(1, 0.3, sessions=3),
    }
    load_ocr(OcrSettings(**settings, ocr_threads=2))
    assert asked["engine_config"] == {"intra_op_num_threads": 2}


def test_rapidocrs_configuration_takes_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    rapidocr = pytest.importorskip("rapidocr")
    from rapidocr.utils.parse_parameters import ParseParams

    def load(parameters: dict[str, Any]) -> None:
        folder = Path(rapidocr.__file__).parent
        found = ParseParams.update_batch(ParseParams.load(folder / "config.yaml"), parameters)
        cuda = dict(found.EngineConfig.onnxruntime.cuda_ep_cfg)
        assert {name: cuda[name] for name in wanted} == wanted
        raise Stop

    wanted = onnxruntime_cuda_options(1, 0.3, sessions=3)
    monkeypatch.setattr("inferq.consumers.ocr.rapid._load", load)
    with pytest.raises(Stop):
        load_ocr(OcrSettings(device="cuda:1", gpu_memory_fraction=0.3))
    wanted = {
        "device_id": 0,
        "arena_extend_strategy": "kNextPowerOfTwo",
        "cudnn_conv_algo_search": "HEURISTIC",
    }
    with pytest.raises(Stop):
        load_ocr(OcrSettings(device="cuda"))


def test_the_end_of_onnxruntimes_arena_is_memory_that_ran_out() -> None:
    said = "bfc_arena.cc:359 Available memory of 16 is smaller than requested bytes of 32"
    assert out_of_memory(RuntimeError(said))
    assert not out_of_memory(RuntimeError("a batch is smaller than requested"))
