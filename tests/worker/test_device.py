"""A worker that is set to a GPU and has none says so, before it takes a task."""

from __future__ import annotations

import ctypes
import socket
from typing import Any

import pytest
from typer.testing import CliRunner

from inferq.consumers.engine import Context, Engine, EngineSettings
from inferq.consumers.facefusion.engine import load_backend
from inferq.consumers.facefusion.settings import FacefusionSettings
from inferq.consumers.machine import gpu_fault
from inferq.consumers.runtime import child
from inferq.consumers.runtime.channel import Channel
from inferq.producer.cli import app
from inferq.schemas import EngineInfo, InstallationError, Task, TaskType, get_type

NO_DRIVER = "there is no GPU here: the NVIDIA driver's libcuda.so.1 is missing"


class Driver:
    """A CUDA driver with one GPU, unless it answers with an error."""

    def __init__(self, error: int = 0) -> None:
        self.error = error

    def __call__(self, name: str) -> Driver:
        assert name == "libcuda.so.1"
        return self

    def cuInit(self, _flags: int) -> int:
        return self.error

    def cuGetErrorName(self, code: int, name: Any) -> int:
        assert code == 100
        name._obj.value = b"CUDA_ERROR_NO_DEVICE"
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = 1
        return 0


def no_driver(_name: str) -> None:
    raise OSError("libcuda.so.1: cannot open shared object file: No such file or directory")


@pytest.mark.parametrize(
    ("driver", "number", "fault"),
    [
        (no_driver, 0, NO_DRIVER),
        (Driver(100), 0, "there is no GPU here: the NVIDIA driver answers CUDA_ERROR_NO_DEVICE"),
        (Driver(), 0, None),
        (Driver(), 2, "there is no GPU 2 here: the NVIDIA driver has 1, numbered from 0"),
    ],
)
def test_the_driver_says_whether_there_is_a_gpu(
    monkeypatch: pytest.MonkeyPatch, driver: Any, number: int, fault: str | None
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", driver)
    assert gpu_fault(number) == fault


@pytest.mark.parametrize(
    ("task_type", "env", "number"),
    [
        ("ocr", {"INFERQ_DEVICE": "cuda:1"}, 1),
        ("ocr", {"INFERQ_DEVICE": "gpu"}, 0),
        ("ocr", {"INFERQ_OCR_DEVICE": "gpu"}, 0),
        ("ocr", {"INFERQ_DEVICE": "cuda:1", "INFERQ_OCR_DEVICE": "gpu"}, 1),
        ("ocr", {"INFERQ_DEVICE": "cuda", "INFERQ_OCR_DEVICE": "onnxruntime"}, 0),
        ("ocr", {"INFERQ_DEVICE": "cuda", "INFERQ_OCR_DEVICE": "cpu"}, None),
        ("ocr", {}, None),
        ("ner", {"INFERQ_DEVICE": "cuda"}, 0),
        ("ner", {"INFERQ_DEVICE": "cuda", "INFERQ_NER_DEVICE": "cpu"}, None),
        ("ner", {"INFERQ_NER_DEVICE": "gpu"}, 0),
        ("acestep", {"INFERQ_DEVICE": "cuda"}, 0),
        ("facefusion", {"INFERQ_DEVICE": "cuda"}, 0),
        ("facefusion", {"INFERQ_FACEFUSION_BACKEND": "facefusion"}, 0),
        (
            "facefusion",
            {"INFERQ_FACEFUSION_BACKEND": "facefusion", "INFERQ_FACEFUSION_PROVIDERS": "cuda,cpu"},
            None,
        ),
        (
            "facefusion",
            {"INFERQ_FACEFUSION_BACKEND": "facefusion", "INFERQ_FACEFUSION_PROVIDERS": "rocm"},
            None,
        ),
        ("echo", {"INFERQ_DEVICE": "cuda"}, None),
    ],
)
def test_check_asks_for_the_gpu_that_the_engine_needs(
    monkeypatch: pytest.MonkeyPatch, task_type: str, env: dict[str, str], number: int | None
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(child, "gpu_fault", lambda number: asked.append(number) or NO_DRIVER)
    ended = CliRunner().invoke(app, ["worker", task_type, "--check"], env=env)
    assert asked == ([] if number is None else [number])
    if number is None:
        assert ended.exit_code == 0, ended.output
        return
    assert isinstance(ended.exception, InstallationError)
    assert ended.exception.code == "device_unavailable"
    assert str(ended.exception).startswith(
        f"the {task_type} engine is set to compute on a GPU, but {NO_DRIVER};"
    )


def test_facefusion_without_its_gpu_fails_at_the_start_and_not_with_each_task(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("inferq.consumers.facefusion.engine.gpu_fault", lambda number: NO_DRIVER)
    settings = FacefusionSettings(facefusion_backend="facefusion")
    with pytest.raises(
        InstallationError, match=f"INFERQ_FACEFUSION_PROVIDERS=cuda, but {NO_DRIVER}"
    ) as caught:
        load_backend(settings)
    assert caught.value.code == "device_unavailable"


class Framework(Engine[Task]):
    """An engine whose library finds no GPU."""

    def load(self) -> EngineInfo:
        raise InstallationError("the library finds no GPU", code="device_unavailable")

    def run(self, task: Task, context: Context) -> dict[str, Any]:
        raise NotImplementedError


def test_the_engine_process_adds_the_reason_to_what_a_library_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFERQ_DEVICE", "cuda")
    monkeypatch.setattr(child, "gpu_fault", lambda number: NO_DRIVER)
    echo = get_type("echo")
    task_type = TaskType(
        name="echo",
        task=echo.task,
        output=echo.output,
        engine=f"{__name__}:Framework",
        settings=EngineSettings,
    )
    ours, theirs = socket.socketpair()
    with ours, theirs:
        child._serve(task_type, Channel(theirs))
        answer = ours.recv(65536)
    assert f"{NO_DRIVER}. the library finds no GPU".encode() in answer
    assert b"device_unavailable" in answer
