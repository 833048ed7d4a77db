"""An engine computes tasks together, and each ends as if it were alone.

Most tests let the worker's side and the engine's side of a group talk in one process.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import pytest
from pydantic import BaseModel

from inferq.consumers.echo import EchoOutput, EchoTask
from inferq.consumers.echo.engine import EchoEngine
from inferq.consumers.engine import Context, TaskAborted
from inferq.consumers.runtime import group
from inferq.consumers.runtime.channel import LARGEST_BYTES, Channel
from inferq.consumers.runtime.computing import compute_group
from inferq.consumers.runtime.group import GroupRun
from inferq.consumers.runtime.memory import MemoryLimits
from inferq.consumers.runtime.messages import (
    Alone,
    BatchBegun,
    Done,
    Failed,
    Job,
    RunGroup,
    from_worker,
    send,
)
from inferq.consumers.runtime.process import AbortReason, BatchHooks, EngineProcess, RunAborted
from inferq.schemas import InvalidTask, TransientFailure, get_type
from tests.waiting import eventually
from tests.worker.conftest import PLUGIN

Ending = Done | Failed | RunAborted | Alone
Aborts = Callable[[], Mapping[int, AbortReason]]


def task_of(payload: Any, **more: Any) -> str:
    return json.dumps({"task_id": "t", "task_type": "echo", "payload": payload, **more})


def job(payload: Any, time_limit: float = 20) -> Job:
    return Job(task_of(payload), "/nonexistent", {}, time_limit)


class Scripted(EchoEngine):
    """Does what a payload says. Its first letter is the batch's key. Notes the batches; a single run is one of one."""

    batch_size = 4
    faults: Mapping[str, Exception]

    def __init__(self) -> None:
        self.batches: list[list[Any]] = []
        self.limits: list[float] = []
        self.steps = threading.Semaphore(0)

    def batch_key(self, task: EchoTask) -> Hashable:
        if task.payload == "no key":
            raise InvalidTask("it has no key", code="no_key")
        return [] if task.payload == "unhashable" else str(task.payload)[0]

    def run(self, task: EchoTask, context: Context) -> Any:
        return self._note([task], [context])[0]

    def run_batch(self, tasks: Sequence[EchoTask], contexts: Sequence[Context]) -> Any:
        return self._note(tasks, contexts)

    def _note(self, tasks: Sequence[EchoTask], contexts: Sequence[Context]) -> Any:
        self.batches.append([task.payload for task in tasks])
        self.limits += {context.time_limit for context in contexts}
        for context in contexts:
            context.progress(0.5, "half")
        return self.outputs(tasks, contexts)

    def outputs(self, tasks: Sequence[EchoTask], contexts: Sequence[Context]) -> Any:
        return [EchoOutput(payload=task.payload) for task in tasks]


class Talk:
    """What came of a group: how each job ended, in the order of the ends, and the progress of each."""

    def __init__(self, engine: Scripted, jobs: Sequence[Job]) -> None:
        self.engine = engine
        self.jobs = jobs
        self.ended: dict[int, Ending] = {}
        self.progress: list[int] = []
        self.overdue_after: list[float] = []

    def start(
        self, *, aborts: Aborts = dict, abort_grace: float = 20, look: Callable[[], None] = lambda: None
    ) -> GroupRun:
        begun = time.monotonic()

        def look_or_fail() -> None:
            assert time.monotonic() < begun + 30, "it takes too long"
            look()

        hooks = BatchHooks(lambda place, *_: self.progress.append(place), aborts, self._end)
        begin = self.overdue_after.append
        self.run = GroupRun(self.jobs, hooks, abort_grace, look=look_or_fail, begin=begin)
        return self.run

    def follow(
        self, *, aborts: Aborts = dict, most: int = 32, abort_grace: float = 20, look: Any = lambda: None
    ) -> bool:
        near, far = map(Channel, socket.socketpair())
        self.start(aborts=aborts, abort_grace=abort_grace, look=look)
        with closing(far), ThreadPoolExecutor(1) as pool:
            send(near, RunGroup(jobs=tuple(self.jobs), most=most))
            message = from_worker(far)
            assert isinstance(message, RunGroup)
            computed = pool.submit(compute_group, self.engine, get_type("echo"), message, far)
            try:
                stopped = self.run.follow(near)
            finally:
                near.close()
                self.engine.steps.release(100)
            if stopped:
                computed.result(20)
        return stopped

    def _end(self, place: int, ending: Ending) -> None:
        assert place not in self.ended
        self.ended[place] = ending

    def codes(self) -> list[str]:
        """How the jobs ended, in their order: an error's code, a reason, or the output."""
        return [said(self.ended[place]) for place in range(len(self.jobs))]


def said(ending: Ending) -> str:
    match ending:
        case Done(output=output):
            return str(json.loads(output or b"")["payload"])
        case Failed(code=code):
            return f"failed: {code}"
        case Alone(reason=reason) | RunAborted(reason=reason):
            return f"{type(ending).__name__}: {reason}"


def test_a_batch_holds_the_tasks_of_one_key_in_their_order_and_no_more_than_fit() -> None:
    engine = Scripted()
    talk = Talk(engine, [job(p) for p in ("a1", "b1", "a2", "a3", "b2", "a4", "a5", "c1")])
    assert talk.follow()
    assert engine.batches == [["a1", "a2", "a3", "a4"], ["b1", "b2"], ["a5"], ["c1"]]
    assert list(talk.ended) == [0, 2, 3, 5, 1, 4, 6, 7]  # each batch when it is done
    assert talk.codes() == ["a1", "b1", "a2", "a3", "b2", "a4", "a5", "c1"]
    assert [ending.batch_size for ending in talk.ended.values() if isinstance(ending, Done)] == [
        4, 4, 4, 4, 2, 2, 1, 1,
    ]  # fmt: skip
    assert talk.progress == list(talk.ended)
    assert talk.run.answered == 8


@pytest.mark.parametrize(("most", "sizes"), [(2, [2, 2, 1]), (1, [1] * 5), (0, [1] * 5), (99, [4, 1])])
def test_the_worker_limits_the_size_of_a_batch(most: int, sizes: list[int]) -> None:
    engine = Scripted()
    assert Talk(engine, [job(f"a{n}") for n in range(5)]).follow(most=most)
    assert [len(batch) for batch in engine.batches] == sizes


def test_a_task_that_cannot_be_read_or_has_no_key_fails_alone() -> None:
    engine = Scripted()
    unknown = Job(task_of("a", paylod=1), "/nonexistent", {}, 20)
    talk = Talk(engine, [job("a1"), unknown, job("no key"), job("a2"), job("unhashable")])
    assert talk.follow()
    assert talk.codes() == [
        "a1", "failed: invalid_task", "failed: no_key", "a2", "failed: engine_error",
    ]  # fmt: skip
    assert engine.batches == [["a1", "a2"]]
    refused = talk.ended[1]
    assert isinstance(refused, Failed)
    assert refused.invalid


def test_a_task_whose_output_is_an_error_or_wrong_fails_alone() -> None:
    class Engine(Scripted):
        def outputs(self, tasks: Sequence[EchoTask], contexts: Sequence[Context]) -> Any:
            contexts[4].artifact("a.txt", "text/plain")
            return [
                InvalidTask("no", code="never"),
                TransientFailure("not now", code="not_now"),
                RuntimeError("a secret"),
                MemoryError(),
                EchoOutput(payload="written nowhere"),
                {"paylod": 1},
                {"payload": "a6"},
                TaskAborted(),
            ]

    engine = Engine()
    engine.batch_size = 8
    talk = Talk(engine, [job(f"a{n}") for n in range(8)])
    assert talk.follow()
    assert talk.codes() == [
        "failed: never", "failed: not_now", "failed: engine_error", "failed: out_of_memory",
        "failed: engine_error", "failed: engine_error", "a6", "failed: engine_error",
    ]  # fmt: skip
    assert [e.invalid for e in talk.ended.values() if isinstance(e, Failed)] == [True] + [False] * 6
    assert "secret" not in repr(talk.ended)
    assert talk.run.out_of_memory
    assert len(engine.batches) == 1


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("a secret"), "raised"),
        (InvalidTask("a secret"), "raised"),
        (MemoryError(), "out_of_memory"),
        (RuntimeError("CUDA out of memory"), "out_of_memory"),
        (TaskAborted(), "raised"),
        (None, "raised"),
    ],
)
def test_a_batch_that_fails_as_a_whole_charges_none_of_its_tasks(
    error: Exception | None, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Engine(Scripted):
        def outputs(self, tasks: Sequence[EchoTask], contexts: Sequence[Context]) -> Any:
            if tasks[0].payload == "b0":
                return super().outputs(tasks, contexts)
            if error is None:
                return [EchoOutput(payload=1)]  # for two tasks
            raise error

    talk = Talk(Engine(), [job("a1"), job("a2"), job("b0")])
    assert talk.follow()
    assert talk.codes() == [f"Alone: {reason}"] * 2 + ["b0"]
    assert "secret" not in repr(talk.ended)
    assert talk.run.out_of_memory is (reason == "out_of_memory")
    assert len(caplog.records) == (not isinstance(error, TaskAborted))


def test_a_batch_of_one_is_a_run() -> None:
    class Engine(Scripted):
        def run_batch(self, tasks: Any, contexts: Any) -> Any:
            raise AssertionError("it has no company")

        def outputs(self, tasks: Sequence[EchoTask], contexts: Sequence[Context]) -> Any:
            if tasks[0].payload == "a1":
                raise MemoryError
            return super().outputs(tasks, contexts)

    talk = Talk(Engine(), [job("a1"), job("b1")])
    assert talk.follow()
    assert talk.codes() == ["failed: out_of_memory", "b1"]


class Stepwise(Scripted):
    """Looks whether to stop, for each job that is still wanted, until the test lets it go on."""

    def outputs(self, tasks: Sequence[EchoTask], contexts: Sequence[Context]) -> Any:
        outputs: list[BaseModel | Exception] = [EchoOutput(payload=task.payload) for task in tasks]
        while not self.steps.acquire(timeout=0.01):
            for place, context in enumerate(contexts):
                if context.should_abort():
                    outputs[place] = TaskAborted()
            if all(isinstance(output, TaskAborted) for output in outputs):
                break
        return outputs


class Careless(Stepwise):
    """Checks each job, so that a cancel of one stops all."""

    def outputs(self, tasks: Sequence[EchoTask], contexts: Sequence[Context]) -> Any:
        while not self.steps.acquire(timeout=0.01):
            for context in contexts:
                context.check_abort()
        return [EchoOutput(payload=task.payload) for task in tasks]


@pytest.mark.parametrize(
    ("kind", "neighbours"), [(Stepwise, ["a2", "a3"]), (Careless, ["Alone: raised", "Alone: raised"])]
)
def test_a_cancelled_job_ends_at_once_and_its_neighbours_go_on(
    kind: type[Stepwise], neighbours: list[str]
) -> None:
    engine = kind()
    talk = Talk(engine, [job("a1"), job("a2"), job("a3"), job("b1"), job("c1")])

    def aborts() -> Mapping[int, AbortReason]:
        if 0 in talk.ended:
            if len(engine.batches) == 1 and kind is Stepwise:
                assert not {1, 2} & talk.ended.keys()
                engine.steps.release()
            elif len(engine.batches) == 2:
                engine.steps.release(100)
        return {0: "cancelled", 3: "cancelled"}

    assert talk.follow(aborts=aborts)
    assert list(talk.ended)[:2] == [0, 3]
    assert talk.codes() == ["RunAborted: cancelled", *neighbours, "RunAborted: cancelled", "c1"]
    assert ["b1"] not in engine.batches


def test_a_batch_whose_jobs_are_all_cancelled_stops_and_the_next_one_begins() -> None:
    engine = Stepwise()
    talk = Talk(engine, [job("a1"), job("a2"), job("b1")])

    def aborts() -> Mapping[int, AbortReason]:
        if ["b1"] in engine.batches:
            engine.steps.release(100)
        return {0: "cancelled", 1: "cancelled"}

    assert talk.follow(aborts=aborts)
    assert talk.codes() == ["RunAborted: cancelled", "RunAborted: cancelled", "b1"]


def test_a_shutdown_of_one_job_stops_all_and_a_cancelled_one_is_cancelled() -> None:
    engine = Stepwise()
    talk = Talk(engine, [job("a1"), job("a2"), job("a3"), job("b1")])
    assert talk.follow(aborts=lambda: {0: "shutdown", 1: "cancelled"})
    shutdown = "RunAborted: shutdown"
    assert talk.codes() == [shutdown, "RunAborted: cancelled", shutdown, shutdown]
    assert ["b1"] not in engine.batches


def test_a_batch_that_ends_before_it_stops_for_a_shutdown_counts() -> None:
    class Engine(Scripted):
        def outputs(self, tasks: Sequence[EchoTask], contexts: Sequence[Context]) -> Any:
            eventually(contexts[0].should_abort)
            return super().outputs(tasks, contexts)

    talk = Talk(Engine(), [job("a1"), job("a2"), job("b1")])
    assert talk.follow(aborts=lambda: {2: "shutdown"})
    assert talk.codes() == ["a1", "a2", "RunAborted: shutdown"]


def test_the_shortest_time_limit_of_a_batch_is_its_own_and_the_next_one_begins() -> None:
    engine = Stepwise()
    talk = Talk(engine, [job("a1", 30), job("a2", 0.1), job("b1", 40), job("b2", 50)])

    def aborts() -> Mapping[int, AbortReason]:
        if len(engine.batches) > 1:
            engine.steps.release(100)
        return {}

    assert talk.follow(aborts=aborts)
    assert talk.codes() == ["Alone: time_limit", "Alone: time_limit", "b1", "b2"]
    assert engine.limits == [0.1, 40]
    assert {20.1, 60} <= set(talk.overdue_after)  # each with the time to stop


def test_an_engine_that_forms_no_batch_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    class Engine(Scripted):
        def batch_key(self, task: EchoTask) -> Hashable:
            self.steps.acquire(timeout=60)
            return super().batch_key(task)

    monkeypatch.setattr(group, "SEND_SECONDS", 0.1)
    talk = Talk(Engine(), [job("a1", 0.1), job("b1")])
    assert not talk.follow()
    assert talk.codes() == ["Alone: time_limit"] * 2


def test_the_time_between_two_batches_is_not_that_of_the_first() -> None:
    near, far = map(Channel, socket.socketpair())
    talk = Talk(Scripted(), [job("a1", 0.2), job("b1")])

    def compute(place: int) -> None:
        send(far, BatchBegun(places=(place,)))
        send(far, Done(place=place, output=b'{"payload": "fine"}', seconds=0))

    with closing(near), closing(far):
        compute(0)
        assert talk.start(look=lambda: compute(1)).follow(near)
    assert talk.codes() == ["fine", "fine"]


def test_a_batch_of_one_beyond_its_time_limit_has_failed() -> None:
    talk = Talk(Stepwise(), [job("a1", 0.1)])
    assert talk.follow()
    assert talk.codes() == ["failed: time_limit"]


@pytest.mark.parametrize("reason", ["cancelled", "shutdown", "time_limit"])
def test_an_engine_that_does_not_stop_is_given_up_and_what_has_not_begun_is_not_charged(
    reason: AbortReason,
) -> None:
    class Engine(Scripted):
        def outputs(self, tasks: Sequence[EchoTask], contexts: Sequence[Context]) -> Any:
            self.steps.acquire(timeout=60)
            return super().outputs(tasks, contexts)

    over_time = str(reason) == "time_limit"
    talk = Talk(Engine(), [job("a1", 0.3 if over_time else 20), job("a2"), job("b1")])
    aborted: dict[int, AbortReason] = {} if over_time else {0: reason, 1: reason}
    began = time.monotonic()
    assert not talk.follow(aborts=lambda: aborted, abort_grace=0.1)
    assert time.monotonic() - began < 10
    talk.run.give_up("engine_died", "it was killed")
    kind = "Alone" if over_time else "RunAborted"
    last = "RunAborted: shutdown" if reason == "shutdown" else "Alone: engine_died"
    assert talk.codes() == [f"{kind}: {reason}", f"{kind}: {reason}", last]


@pytest.mark.parametrize("fault", ["engine_died", "out_of_memory"])
def test_when_the_process_is_gone_each_open_job_ends(fault: Any) -> None:
    engine = Stepwise()
    talk = Talk(engine, [job("a1"), job("a2"), job("b1")])

    def look() -> None:
        raise EOFError

    with pytest.raises(EOFError):
        talk.follow(look=look)
    talk.run.give_up(fault, "it is gone")
    assert talk.codes() == [f"Alone: {fault}", f"Alone: {fault}", "Alone: engine_died"]


# With engine processes.


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., EngineProcess]]:
    """Starts an engine process whose batches hold up to eight tasks."""
    monkeypatch.setenv("PYTHONPATH", str(PLUGIN), prepend=os.pathsep)
    monkeypatch.setenv("FAULTY_BATCH_SIZE", "8")
    started: list[EngineProcess] = []

    def start(name: str = "faulty", kill_at: int | None = None) -> EngineProcess:
        engine = EngineProcess(name, MemoryLimits(kill_at))
        started.append(engine)
        engine.spawn()
        engine.wait_ready(limit=60)
        return engine

    yield start
    for engine in started:
        engine.close()


def faulty(fault: str = "none", time_limit: float = 20, **options: Any) -> Job:
    task = {"task_id": "t", "task_type": "faulty", "fault": fault, "options": options}
    return Job(json.dumps(task), "/nonexistent", {}, time_limit)


def run_batch(
    engine: EngineProcess, *jobs: Job, aborts: Aborts = dict, abort_grace: float = 1, most: int = 99
) -> list[Ending]:
    ended: dict[int, Ending] = {}

    def end(place: int, ending: Ending) -> None:
        assert place not in ended
        ended[place] = ending

    hooks = BatchHooks(lambda *_: None, aborts, end)
    engine.run_batch(jobs, watch=hooks, abort_grace=abort_grace, most=most)
    return [ended[place] for place in range(len(jobs))]


def reasons(endings: Sequence[Ending]) -> list[str]:
    return [ending.reason if isinstance(ending, Alone | RunAborted) else ending.kind for ending in endings]


def test_a_batch_after_which_memory_is_short_wears_the_process_out(
    start: Callable[..., EngineProcess],
) -> None:
    engine = start()
    assert engine.batch_size == 8
    fits = [faulty("batch_memory", fits=2) for _ in range(4)]
    assert reasons(run_batch(engine, *fits, faulty(key="other"), most=2)) == ["done"] * 5
    assert (engine.tasks, engine.worn, engine.usable) == (5, None, True)
    assert reasons(run_batch(engine, *fits, faulty(key="other"))) == ["out_of_memory"] * 4 + ["done"]
    assert (engine.tasks, engine.worn, engine.usable) == (10, "out_of_memory", False)


@pytest.mark.parametrize(
    ("fault", "time_limit", "reason"),
    [("crash", 20, "engine_died"), ("hang_hard", 0.5, "time_limit"), ("swell", 20, "out_of_memory")],
)
def test_a_batch_that_takes_its_engine_along_charges_none_of_its_tasks(
    start: Callable[..., EngineProcess], fault: str, time_limit: float, reason: str
) -> None:
    engine = start(kill_at=400_000_000)
    culprit = faulty(fault, time_limit, megabytes=2000)
    endings = run_batch(engine, faulty(), culprit, faulty(key="other"), faulty(), abort_grace=0.1)
    assert reasons(endings) == [reason, reason, "engine_died", reason]
    assert (engine.usable, engine.alive, engine.overdue, engine.run_seconds) == (False, False, 0, None)
    assert reasons(run_batch(engine, faulty())) == ["engine_died"]


def test_a_batch_that_its_own_thread_does_not_end_is_overdue_and_ends_from_another(
    start: Callable[..., EngineProcess],
) -> None:
    engine = start()
    stuck = threading.Event()

    def look() -> Mapping[int, AbortReason]:
        stuck.wait(60)  # a service that does not answer
        return {}

    jobs = faulty(), faulty("hang_hard", 0.5)
    with ThreadPoolExecutor() as pool:
        run = pool.submit(run_batch, engine, *jobs, aborts=look, abort_grace=0)
        eventually(lambda: engine.overdue)
        assert engine.run_seconds
        engine.kill_overdue()
        eventually(lambda: not engine.alive)
        stuck.set()
        assert set(reasons(run.result(60))) <= {"engine_died", "time_limit"}
    assert not engine.overdue


def test_a_group_may_be_larger_than_any_message_of_an_engine(start: Callable[..., EngineProcess]) -> None:
    engine, text = start("echo"), "x" * 60_000
    jobs = [job(text) for _ in range(LARGEST_BYTES // len(text) + 1)]
    endings = run_batch(engine, *jobs)
    assert {said(ending) for ending in endings} == {text}
    assert len(endings) == len(jobs) == engine.tasks
