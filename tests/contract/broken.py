"""A sound engine, and engines that each break the contract in one way."""

from __future__ import annotations

import ctypes
import itertools
import os
import tempfile
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from inferq.consumers.engine import Context, Engine, TaskAborted
from inferq.schemas import EngineInfo, InvalidTask
from tests.contract.counting import CountOutput, CountTask

PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"


class Sound(Engine[CountTask]):
    """Does all that is asked for; its parts are what the others get wrong."""

    def load(self) -> EngineInfo:
        return EngineInfo(name="count", version="1", model="none", device="cpu")

    def run(self, task: CountTask, context: Context) -> Any:
        self.check(task)
        for step in range(task.steps):
            context.check_abort()
            context.progress(step / task.steps)
        context.artifact("count.json", "application/json").write_text("[1]")
        context.artifact("count.png", "image/png").write_bytes(PNG)
        return CountOutput(share=0.5)

    def check(self, task: CountTask) -> None:
        if task.steps < 0:
            raise InvalidTask(f"steps is {task.steps}: count upward", code="downward")


class AnotherShape(Sound):
    def run(self, task: CountTask, context: Context) -> Mapping[str, Any]:
        return {"portion": 0.5}


class BeyondItsSchema(Sound):
    def run(self, task: CountTask, context: Context) -> CountOutput:
        return CountOutput.model_construct(share=1.5)


class NoNumber(Sound):
    def run(self, task: CountTask, context: Context) -> CountOutput:
        return CountOutput.model_construct(share=float("nan"))


class ProgressGoesBack(Sound):
    reports: ClassVar[tuple[float, ...]] = (0.2, 0.8, 0.4)

    def run(self, task: CountTask, context: Context) -> CountOutput:
        for fraction in self.reports:
            context.progress(fraction)
        return CountOutput(share=0.5)


class ProgressInPercent(ProgressGoesBack):
    reports = (0.0, 50.0)


class ProgressBelowZero(ProgressGoesBack):
    reports = (-0.1,)


class ProgressOfNothing(ProgressGoesBack):
    reports = (float("nan"),)


class NeverLooks(Sound):
    def run(self, task: CountTask, context: Context) -> CountOutput:
        self.check(task)
        return CountOutput(share=0.5)


class SwallowsTheAbort(Sound):
    def run(self, task: CountTask, context: Context) -> Any:
        try:
            return super().run(task, context)
        except Exception:
            return CountOutput(share=0)


class GivesHalfAnAnswer(Sound):
    def run(self, task: CountTask, context: Context) -> CountOutput:
        for step in range(task.steps):
            if context.should_abort():
                return CountOutput(share=step / task.steps)
        return CountOutput(share=1)


class ForgetsTheLastLook(Sound):
    def run(self, task: CountTask, context: Context) -> CountOutput:
        for _ in range(task.steps):
            context.check_abort()
        context.should_abort()
        return CountOutput(share=1)


class AbortsWithAnotherError(Sound):
    def run(self, task: CountTask, context: Context) -> Any:
        try:
            return super().run(task, context)
        except TaskAborted:
            raise RuntimeError("stopped") from None


class UnusableAfterAnAbort(Sound):
    stopped = False

    def run(self, task: CountTask, context: Context) -> Any:
        if self.stopped:
            raise RuntimeError("the last run is still open")
        try:
            return super().run(task, context)
        except TaskAborted:
            self.stopped = True
            raise


class RefusesAsIfItMightPass(Sound):
    def check(self, task: CountTask) -> None:
        if task.steps < 0:
            raise ValueError("steps is negative")


class RefusesNothing(Sound):
    def check(self, task: CountTask) -> None:
        return


class RefusesAsSomethingElse(Sound):
    def check(self, task: CountTask) -> None:
        if task.steps < 0:
            raise InvalidTask("no", code="no")


class RefusesWithoutAWord(Sound):
    def check(self, task: CountTask) -> None:
        if task.steps < 0:
            raise InvalidTask("", code="downward")


class UnusableAfterARefusal(Sound):
    refused = False

    def check(self, task: CountTask) -> None:
        if self.refused:
            raise RuntimeError("the last document is still open")
        self.refused = task.steps < 0
        super().check(task)


class Artifacts(Sound):
    name, content_type, content = "a.png", "image/png", PNG

    def run(self, task: CountTask, context: Context) -> CountOutput:
        context.artifact(self.name, self.content_type).write_bytes(self.content)
        return CountOutput(share=0.5)


class WritesNoArtifact(Sound):
    def run(self, task: CountTask, context: Context) -> CountOutput:
        context.artifact("a.png", "image/png")
        return CountOutput(share=0.5)


class WritesAnEmptyArtifact(Artifacts):
    content = b""


class CallsAPngAJpeg(Artifacts):
    name, content_type = "a.jpg", "image/jpeg"


class CallsTextAWav(Artifacts):
    name, content_type, content = "a.wav", "audio/wav", b"this is no sound"


class CallsHalfAListJson(Artifacts):
    name, content_type, content = "a.json", "application/json", b"[1, 2"


class CallsBytesText(Artifacts):
    name, content_type, content = "a.txt", "text/plain; charset=utf-8", b"\xff\xfe\x00"


class AnswersDifferently(Sound):
    def __init__(self) -> None:
        self._numbers = itertools.count()

    def run(self, task: CountTask, context: Context) -> CountOutput:
        return CountOutput(share=next(self._numbers) / 1_000_000)


class DrawsDifferently(AnswersDifferently):
    def run(self, task: CountTask, context: Context) -> CountOutput:
        context.artifact("a.txt", "text/plain").write_text(str(next(self._numbers)))
        return CountOutput(share=0.5)


class LeavesScratch(Sound):
    def run(self, task: CountTask, context: Context) -> Any:
        (context.scratch / "frame-1.raw").write_bytes(b"pixels")
        return super().run(task, context)


class LeavesTemporaryFiles(Sound):
    def run(self, task: CountTask, context: Context) -> Any:
        handle, _ = tempfile.mkstemp(prefix="frame-")
        os.close(handle)
        return super().run(task, context)


class LeavesTemporaryFilesOnRefusal(Sound):
    def check(self, task: CountTask) -> None:
        if task.steps < 0:
            tempfile.mkdtemp(prefix="frame-")
        super().check(task)


class LeavesTemporaryFilesOnAbort(Sound):
    def run(self, task: CountTask, context: Context) -> Any:
        folder = tempfile.mkdtemp(prefix="frame-")
        output = super().run(task, context)
        Path(folder).rmdir()
        return output


class LeavesFilesWhereItRuns(Sound):
    def run(self, task: CountTask, context: Context) -> Any:
        Path("count.log").write_text("counted")
        return super().run(task, context)


class LeavesFilesElsewhere(Sound):
    elsewhere: ClassVar[Path]
    numbers = itertools.count()

    def run(self, task: CountTask, context: Context) -> Any:
        (self.elsewhere / f"run-{next(self.numbers)}.log").write_text("counted")
        return super().run(task, context)


class KeepsItsTasks(Sound):
    def __init__(self) -> None:
        self._tasks: list[CountTask] = []

    def run(self, task: CountTask, context: Context) -> Any:
        self._tasks.append(task)
        return super().run(task, context)


class LosesNativeMemory(Sound):
    def run(self, task: CountTask, context: Context) -> Any:
        allocate = ctypes.CDLL(None).malloc
        allocate.restype, allocate.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
        ctypes.memset(allocate(2**18), 1, 2**18)
        return super().run(task, context)


class FillsACache(Sound):
    """Sound: what it keeps has an end."""

    def __init__(self) -> None:
        self._cache: list[bytes] = []

    def run(self, task: CountTask, context: Context) -> Any:
        if len(self._cache) < 250:
            self._cache.append(os.urandom(4096))
        return super().run(task, context)


class CannotBeClosed(Sound):
    def close(self) -> None:
        raise RuntimeError("there is no session")


class CanBeClosedOnce(Sound):
    def load(self) -> EngineInfo:
        self._model = object()
        return super().load()

    def close(self) -> None:
        del self._model


class LoadsNothing(Sound):
    def load(self) -> Any:
        return None


class Batches(Sound):
    """Sound: computes tasks together. A share rounds differently there."""

    batch_size = 3

    def run(self, task: CountTask, context: Context) -> Any:
        super().run(task, context)
        return CountOutput(share=1 / max(task.steps, 1))

    def run_batch(self, tasks: Sequence[CountTask], contexts: Sequence[Context]) -> list[Any]:
        return [self.one(task, context) for task, context in zip(tasks, contexts, strict=True)]

    def one(self, task: CountTask, context: Context) -> Any:
        try:
            output = self.run(task, context)
        except Exception as error:
            return error
        return CountOutput(share=output.share * 0.9999)


class StopsTheWholeBatch(Batches):
    """Sound: the worker then computes the others alone."""

    def one(self, task: CountTask, context: Context) -> Any:
        context.check_abort()
        return super().one(task, context)


class RoundsTooMuch(Batches):
    def one(self, task: CountTask, context: Context) -> Any:
        output = super().one(task, context)
        return {"share": output.share * 0.9} if isinstance(output, CountOutput) else output


class HasNoRunBatch(Sound):
    batch_size = 3


class HasNoBatchSize(Batches):
    batch_size = 0


class NeedsCompanyOfItsOwn(Batches):
    def batch_key(self, task: CountTask) -> Hashable:
        return object()


class HasNoHash(Batches):
    def batch_key(self, task: CountTask) -> Any:
        return [task.steps]


class MixesUpItsTasks(Batches):
    def run_batch(self, tasks: Sequence[CountTask], contexts: Sequence[Context]) -> list[Any]:
        return super().run_batch(tasks, contexts)[::-1]


class LosesTheLastTask(Batches):
    def run_batch(self, tasks: Sequence[CountTask], contexts: Sequence[Context]) -> list[Any]:
        return super().run_batch(tasks, contexts)[:-1]


class DrawsDifferentlyInABatch(Batches):
    def one(self, task: CountTask, context: Context) -> Any:
        output = super().one(task, context)
        if context.artifacts:
            context.artifacts[0].path.write_text("[2]")
        return output


class LeavesScratchInABatch(Batches):
    def one(self, task: CountTask, context: Context) -> Any:
        (context.scratch / "frame-1.raw").write_bytes(b"pixels")
        return super().one(task, context)


class ProgressGoesBackInABatch(Batches):
    def one(self, task: CountTask, context: Context) -> Any:
        context.progress(0.9)
        return super().one(task, context)


class FailsInABatch(Batches):
    def one(self, task: CountTask, context: Context) -> Any:
        return RuntimeError("it does not fit")


class FailsTheWholeBatch(Batches):
    def one(self, task: CountTask, context: Context) -> Any:
        return self.run(task, context)


class RefusesNothingInABatch(Batches):
    def one(self, task: CountTask, context: Context) -> Any:
        output = super().one(task, context)
        return CountOutput(share=0) if isinstance(output, InvalidTask) else output


class RefusesAsIfItMightPassInABatch(Batches):
    def one(self, task: CountTask, context: Context) -> Any:
        output = super().one(task, context)
        return ValueError("steps is negative") if isinstance(output, InvalidTask) else output


class RefusesAsSomethingElseInABatch(Batches):
    def one(self, task: CountTask, context: Context) -> Any:
        output = super().one(task, context)
        return InvalidTask("no", code="no") if isinstance(output, InvalidTask) else output


class AbortsWithAnotherErrorInABatch(Batches):
    def one(self, task: CountTask, context: Context) -> Any:
        output = super().one(task, context)
        return RuntimeError("stopped") if isinstance(output, TaskAborted) else output


class AbortsItsNeighbours(Batches):
    def run_batch(self, tasks: Sequence[CountTask], contexts: Sequence[Context]) -> list[Any]:
        outputs = super().run_batch(tasks, contexts)
        stopped = any(isinstance(output, TaskAborted) for output in outputs)
        return [TaskAborted()] * len(outputs) if stopped else outputs


class UnusableAfterAnAbortedBatch(Batches):
    stopped = False

    def run(self, task: CountTask, context: Context) -> Any:
        if self.stopped:
            raise RuntimeError("the last batch is still open")
        return super().run(task, context)

    def run_batch(self, tasks: Sequence[CountTask], contexts: Sequence[Context]) -> list[Any]:
        outputs = super().run_batch(tasks, contexts)
        self.stopped = any(isinstance(output, TaskAborted) for output in outputs)
        return outputs


class NoEngine:
    """Not an inferq.consumers.engine.Engine."""
