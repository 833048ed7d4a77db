"""Engine processes that take too much memory, grow, or have served their time."""

from __future__ import annotations

import re
import signal
import subprocess
from pathlib import Path

import pytest

from inferq.consumers.runtime.computing import _failed, out_of_memory
from inferq.consumers.runtime.memory import EngineMemory, MemoryLimits, memory_of
from inferq.schemas import InvalidTask, TransientFailure, get_type
from inferq.schemas.memory import total_memory
from tests.waiting import eventually
from tests.worker.conftest import Site, WorkerProcess


def replaced(worker: WorkerProcess, reason: str) -> float:
    """How many engine processes the worker has replaced for this reason."""
    name = f'inferq_engine_replacements_total{{reason="{reason}"}}'
    lines = worker.get("/metrics").text.splitlines()
    return float(next((line.split()[1] for line in lines if line.startswith(name)), 0))


def test_a_run_beyond_the_memory_limit_costs_its_attempt_and_its_engine_only(
    site: Site, tmp_path: Path
) -> None:
    worker = site.worker(INFERQ_ENGINE_MEMORY_LIMIT="400MB")
    old = worker.engine_pid()
    options = {"megabytes": 2000, "times": 1, "marker": str(tmp_path / "m")}
    task_id = site.publish({"fault": "swell", "options": options})
    state = eventually(lambda: (s := site.state(task_id)) and s.state == "retrying" and s)
    assert state.error.code == "out_of_memory"
    assert "INFERQ_ENGINE_MEMORY_LIMIT=400.0MB" in state.error.message
    result = site.ended(task_id)
    assert (result.status, result.attempts) == ("succeeded", 2)
    assert worker.engine_pid() != old
    assert replaced(worker, "out_of_memory") == 1


def test_a_task_that_always_takes_too_much_ends_with_that_reason(site: Site) -> None:
    site.worker(INFERQ_ENGINE_MEMORY_LIMIT="300Mi", INFERQ_MAX_ATTEMPTS="2")
    task_id = site.publish({"fault": "swell", "options": {"megabytes": 2000}})
    result = site.ended(task_id)
    assert result.error is not None
    assert (result.error.code, result.error.retryable) == ("out_of_memory", True)
    (letter,) = eventually(site.dead)
    assert letter.reason == "out_of_memory"
    assert site.ended(site.publish({})).status == "succeeded"


@pytest.mark.parametrize("setting", ["INFERQ_ENGINE_MEMORY_LIMIT", "INFERQ_ENGINE_RECYCLE_MEMORY"])
def test_an_engine_that_is_over_its_limit_from_the_start_ends_the_worker_with_advice(
    site: Site, setting: str
) -> None:
    worker = WorkerProcess(site, "faulty", {setting: "1MB"})
    site.workers.append(worker)
    assert worker.process.wait(20) == 1
    said = worker.log.read_text()
    assert f"{setting}=1.0MB" in said
    assert "raise the limit" in said


def test_an_engine_whose_gpu_ran_out_of_memory_is_replaced_and_the_task_tried_again(
    site: Site, tmp_path: Path
) -> None:
    worker = site.worker()
    old = worker.engine_pid()
    options = {"times": 1, "marker": str(tmp_path / "m")}
    task_id = site.publish({"fault": "gpu_memory", "options": options})
    state = eventually(lambda: (s := site.state(task_id)) and s.state == "retrying" and s)
    assert state.error.code == "out_of_memory"
    result = site.ended(task_id)
    assert (result.status, result.attempts) == ("succeeded", 2)
    assert worker.engine_pid() != old
    assert replaced(worker, "out_of_memory") == 1


def test_an_engine_that_has_grown_is_replaced_after_its_task(site: Site) -> None:
    worker = site.worker(INFERQ_ENGINE_RECYCLE_MEMORY="300MB")
    old = worker.engine_pid()
    task_id = site.publish({"fault": "grow", "options": {"megabytes": 400}})
    assert site.ended(task_id).status == "succeeded"
    other = site.publish({})
    assert site.ended(other).attempts == 1
    assert worker.engine_pid() != old
    assert replaced(worker, "memory") == 1
    assert "beyond INFERQ_ENGINE_RECYCLE_MEMORY=300.0MB" in worker.log.read_text()


def test_after_so_many_tasks_a_new_engine_takes_over(site: Site) -> None:
    worker = site.worker(INFERQ_ENGINE_MAX_TASKS="3")
    old = worker.engine_pid()
    for _ in range(3):
        assert site.ended(site.publish({})).status == "succeeded"
    eventually(lambda: replaced(worker, "max_tasks") == 1, what="a new engine")
    eventually(lambda: worker.engine_pid() != old)
    assert [site.ended(site.publish({})).attempts for _ in range(2)] == [1, 1]
    assert replaced(worker, "max_tasks") == 1


def test_where_two_engines_do_not_fit_the_old_one_goes_first(site: Site, tmp_path: Path) -> None:
    switch = tmp_path / "load"
    switch.write_text("no_room")
    worker = site.worker(INFERQ_ENGINE_MAX_TASKS="1", FAULTY_LOAD=str(switch))
    worker.process.send_signal(signal.SIGHUP)
    eventually(lambda: "keeping the old one" in worker.log.read_text())
    old = worker.engine_pid()
    assert site.ended(site.publish({})).status == "succeeded"
    eventually(lambda: replaced(worker, "max_tasks") == 1, what="a new engine")
    eventually(worker.ready)
    assert worker.engine_pid() != old
    assert "ending the old one first" in worker.log.read_text()


def test_a_due_engine_that_does_not_load_leaves_the_old_one_at_work(site: Site, tmp_path: Path) -> None:
    switch = tmp_path / "load"
    worker = site.worker(INFERQ_ENGINE_MAX_TASKS="2", FAULTY_LOAD=str(switch))
    old = worker.engine_pid()
    switch.write_text("error")
    for _ in range(3):
        assert site.ended(site.publish({})).status == "succeeded"
    eventually(lambda: "keeping the old one" in worker.log.read_text())
    assert site.ended(site.publish({})).status == "succeeded"
    assert worker.engine_pid() == old


class OutOfMemoryError(RuntimeError):
    """As torch names it."""


class RuntimeException(Exception):
    """As onnxruntime names its errors."""


def raised_from(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 79.15 GiB in all"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: 8 bytes"
        ),
        RuntimeError(
            "ResourceExhaustedError: \n\nOut of memory error on GPU 0. Cannot allocate 2.0GB memory"
        ),
        OSError("(External) CUDA error(2), out of memory."),
        RuntimeException(
            "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while running Conv "
            "node. bfc_arena.cc:376 Failed to allocate memory for requested buffer of size 1073741824"
        ),
        raised_from(RuntimeError("page 3 cannot be read"), OutOfMemoryError("CUDA out of memory")),
        raised_from(TransientFailure("the page is too large", code="x"), RuntimeError("CUDA out of memory")),
    ],
)
def test_memory_that_ran_out_is_recognised_without_the_framework(error: Exception) -> None:
    assert out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("a bug"),
        InvalidTask("the text 'CUDA out of memory' is too short"),
        ValueError("could not convert string to float: 'out of memory'"),
        KeyError("out of memory"),
        OSError(28, "No space left on device"),
    ],
)
def test_other_errors_are_not_taken_for_it(error: Exception) -> None:
    assert not out_of_memory(error)


def test_without_a_setting_an_engine_may_take_most_of_what_the_container_has_left(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000000000\n")
    limits = (tmp_path / "memory.max", tmp_path / "missing")
    memory = EngineMemory("echo", MemoryLimits(), total_memory=lambda: total_memory(limits))
    with subprocess.Popen(["sleep", "600"]) as process:
        try:
            memory.watch(process.pid)
            memory.check_loaded()
            loaded = memory_of(process.pid)
        finally:
            process.kill()
    assert loaded > 0
    assert memory.kill_at == pytest.approx(loaded + 0.9 * (1e9 - loaded), rel=0.05)


def test_a_machine_without_a_limit_has_all_its_memory(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("max\n")
    assert total_memory([tmp_path / "memory.max"]) > 1 << 28


def test_the_text_of_an_engines_error_is_for_the_log_only(caplog: pytest.LogCaptureFixture) -> None:
    failed = _failed(RuntimeError("postgres://user:planted@10.0.0.1/x"), get_type("echo"), 1.0)
    incident = re.search(r"RuntimeError \(incident ([0-9a-f]{8})\)", failed.message)
    assert failed.code == "engine_error"
    assert incident is not None
    assert "planted" not in failed.message
    assert f"incident {incident[1]}" in caplog.text
    assert "planted" in caplog.text
