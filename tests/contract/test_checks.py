"""Each check of the engine contract lets a sound engine pass, and catches those that break it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from inferq.consumers.testing import Bench, Check, ContractBroken, Sample, Subject, checks, engine_contract
from inferq.consumers.testing.content import is_of_type
from inferq.schemas import Task, TaskType
from tests.contract import broken
from tests.contract.counting import CountOutput, CountTask, LaxTask
from tests.contract.heavy import HeavyTask

SAMPLES = [Sample({"steps": 3}), Sample({"steps": 1})]
TWENTY = range(20, 21)
REFUSED = [Sample({"steps": -1}, code="downward"), Sample({"steps": "many"}, code="invalid_task")]


def subject_of(
    engine: type,
    *,
    samples: list[Sample] = SAMPLES,
    polls: bool = True,
    task: type[Task] = CountTask,
    **described: Any,
) -> Subject:
    path = f"{engine.__module__}:{engine.__name__}"
    task_type = TaskType(name="count", task=task, output=CountOutput, engine=path, **described)
    return Subject(task_type, samples, REFUSED, polls=polls)


test_a_sound_engine = engine_contract(subject_of(broken.Sound, arguments=("steps",)))


@pytest.mark.parametrize("engine", [broken.Batches, broken.StopsTheWholeBatch])
@pytest.mark.parametrize("check", [check for check in checks.CHECKS if "batch" in check.__name__])
def test_a_sound_engine_that_batches(check: Check, engine: type) -> None:
    check(Bench(subject_of(engine)))


@pytest.mark.parametrize(
    ("check", "engine", "complaint"),
    [
        (checks.output_fits_the_schema, broken.NoEngine, "is not an inferq.engine.Engine"),
        (checks.output_fits_the_schema, broken.LoadsNothing, "load() gave None"),
        (checks.output_fits_the_schema, broken.AnotherShape, "not a CountOutput: share: is missing"),
        (checks.output_fits_the_schema, broken.BeyondItsSchema, "at $.share: 1.5 is greater than"),
        (checks.output_fits_the_schema, broken.NoNumber, "at $.share: None is not of type 'number'"),
        (checks.progress_goes_forward, broken.ProgressGoesBack, "went back from 0.8 to 0.4"),
        (checks.progress_goes_forward, broken.ProgressInPercent, "progress 50 is not between"),
        (checks.progress_goes_forward, broken.ProgressBelowZero, "progress -0.1 is not between"),
        (checks.progress_goes_forward, broken.ProgressOfNothing, "progress nan is not between"),
        (checks.cancel_stops_it, broken.NeverLooks, "no run looked for an abort"),
        (checks.cancel_stops_it, broken.SwallowsTheAbort, "at look 1 of 3, run() went on"),
        (checks.cancel_stops_it, broken.GivesHalfAnAnswer, "at look 1 of 3, run() went on"),
        (checks.cancel_stops_it, broken.ForgetsTheLastLook, "at look 4 of 4, run() went on"),
        (checks.cancel_stops_it, broken.AbortsWithAnotherError, "raised RuntimeError('stopped') instead"),
        (checks.cancel_stops_it, broken.UnusableAfterAnAbort, "after a cancelled run the engine fails"),
        (checks.bad_input_is_refused, broken.RefusesAsIfItMightPass, "ValueError('steps is negative')"),
        (checks.bad_input_is_refused, broken.RefusesNothing, "accepted, though it is to be refused"),
        (checks.bad_input_is_refused, broken.RefusesAsSomethingElse, "refused as 'no', not as 'downward'"),
        (checks.bad_input_is_refused, broken.RefusesWithoutAWord, "refused without a message"),
        (checks.bad_input_is_refused, broken.UnusableAfterARefusal, "after a refused task the engine fails"),
        (checks.artifacts_are_what_they_say, broken.WritesNoArtifact, "announced and was not written"),
        (checks.artifacts_are_what_they_say, broken.WritesAnEmptyArtifact, "is empty"),
        (checks.artifacts_are_what_they_say, broken.CallsAPngAJpeg, "'a.jpg' is not image/jpeg"),
        (checks.artifacts_are_what_they_say, broken.CallsTextAWav, "'a.wav' is not audio/wav"),
        (checks.artifacts_are_what_they_say, broken.CallsHalfAListJson, "'a.json' is not application/json"),
        (checks.artifacts_are_what_they_say, broken.CallsBytesText, "'a.txt' is not text/plain"),
        (checks.the_same_task_gives_the_same, broken.AnswersDifferently, "run twice, the output came out"),
        (
            checks.the_same_task_gives_the_same,
            broken.DrawsDifferently,
            "run twice, artifact 'a.txt' came out",
        ),
        (checks.a_batch_gives_what_single_runs_give, broken.HasNoRunBatch, "there is no run_batch"),
        (checks.a_batch_gives_what_single_runs_give, broken.HasNoBatchSize, "batch_size is 0"),
        (
            checks.a_batch_gives_what_single_runs_give,
            broken.NeedsCompanyOfItsOwn,
            "no two tasks the same key",
        ),
        (
            checks.a_batch_gives_what_single_runs_give,
            broken.HasNoHash,
            "batch_key gave [3], which has no hash",
        ),
        (checks.a_batch_gives_what_single_runs_give, broken.RoundsTooMuch, "the output came out differently"),
        (
            checks.a_batch_gives_what_single_runs_give,
            broken.MixesUpItsTasks,
            "the output came out differently",
        ),
        (checks.a_batch_gives_what_single_runs_give, broken.LosesTheLastTask, "gave 1 outputs for 2 tasks"),
        (
            checks.a_batch_gives_what_single_runs_give,
            broken.DrawsDifferentlyInABatch,
            "in a batch, artifact 'count.json' came out differently",
        ),
        (
            checks.a_batch_gives_what_single_runs_give,
            broken.LeavesScratchInABatch,
            "frame-1.raw left in scratch",
        ),
        (
            checks.a_batch_gives_what_single_runs_give,
            broken.ProgressGoesBackInABatch,
            "went back from 0.9 to 0",
        ),
        (
            checks.a_batch_gives_what_single_runs_give,
            broken.FailsInABatch,
            "failed with RuntimeError('it does",
        ),
        (
            checks.a_bad_task_fails_alone_in_a_batch,
            broken.FailsTheWholeBatch,
            "so that its whole batch failed",
        ),
        (checks.a_bad_task_fails_alone_in_a_batch, broken.RefusesNothingInABatch, "accepted in a batch"),
        (
            checks.a_bad_task_fails_alone_in_a_batch,
            broken.RefusesAsIfItMightPassInABatch,
            "it gave ValueError('steps is negative')",
        ),
        (
            checks.a_bad_task_fails_alone_in_a_batch,
            broken.RefusesAsSomethingElseInABatch,
            "in a batch refused as 'no', not as 'downward'",
        ),
        (
            checks.a_cancelled_task_leaves_its_batch_alone,
            broken.AbortsWithAnotherErrorInABatch,
            "it gave RuntimeError('stopped') instead of TaskAborted",
        ),
        (
            checks.a_cancelled_task_leaves_its_batch_alone,
            broken.AbortsItsNeighbours,
            "failed with TaskAborted()",
        ),
        (
            checks.a_cancelled_task_leaves_its_batch_alone,
            broken.UnusableAfterAnAbortedBatch,
            "after a batch with a cancelled task the engine fails",
        ),
        (checks.runs_leave_no_files, broken.LeavesScratch, "frame-1.raw left in scratch"),
        (checks.runs_leave_no_files, broken.LeavesTemporaryFiles, "in the temporary folder"),
        (checks.runs_leave_no_files, broken.LeavesTemporaryFilesOnRefusal, '"steps": -1}: a run left frame-'),
        (checks.runs_leave_no_files, broken.LeavesTemporaryFilesOnAbort, "in the temporary folder"),
        (checks.runs_leave_no_files, broken.LeavesFilesWhereItRuns, "count.log in the working folder"),
        (checks.runs_leave_no_memory, broken.KeepsItsTasks, "what Python allocates grew"),
        (checks.runs_leave_no_memory, broken.LosesNativeMemory, "the process grew"),
        (checks.it_can_be_closed, broken.CannotBeClosed, "RuntimeError('there is no session')"),
        (checks.it_can_be_closed, broken.CanBeClosedOnce, "AttributeError"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_broken_engine_is_caught(
    check: Check, engine: type, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What these leave goes with the test, all but the memory.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    if check is checks.runs_leave_no_memory:
        check = partial(check, rounds_allowed=TWENTY)
    with pytest.raises(ContractBroken) as caught:
        check(Bench(subject_of(engine)))
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("subject", "check", "complaint"),
    [
        (
            subject_of(broken.Sound, arguments=("stride",)),
            checks.describes_itself_without_its_engine,
            "arguments names stride, which CountTask lacks",
        ),
        (
            subject_of(broken.Sound, task=HeavyTask),
            checks.describes_itself_without_its_engine,
            "tests.contract.heavy imports tests.contract.broken",
        ),
        (
            subject_of(broken.Sound, task=LaxTask),
            checks.bad_input_is_refused,
            "derive the options from inferq.engine.Options",
        ),
        (subject_of(broken.Sound, polls=False), checks.cancel_stops_it, "leave polls=False out"),
    ],
    ids=["arguments", "heavy", "lax options", "polls all the same"],
)
def test_a_type_that_is_described_wrongly_is_caught(subject: Subject, check: Check, complaint: str) -> None:
    with pytest.raises(ContractBroken) as caught:
        check(Bench(subject))
    assert complaint in str(caught.value)


def test_a_description_that_cannot_be_imported_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CountTask, "__module__", "tests.contract.absent")
    with pytest.raises(ContractBroken, match=r"absent cannot be imported:(?s:.*)ModuleNotFoundError"):
        checks.describes_itself_without_its_engine(Bench(subject_of(broken.Sound)))


def test_files_left_anywhere_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broken.LeavesFilesElsewhere, "elsewhere", tmp_path, raising=False)
    with pytest.raises(ContractBroken) as caught:
        checks.runs_leave_no_files(Bench(subject_of(broken.LeavesFilesElsewhere)))
    assert f"a run left {tmp_path}/run-1.log" in str(caught.value)


def test_a_cache_that_fills_up_is_no_leak() -> None:
    # It is full in one of the last blocks in which Python's memory is looked at.
    bench = Bench(subject_of(broken.FillsACache, samples=SAMPLES[:1]))
    checks.runs_leave_no_memory(bench, rounds_allowed=TWENTY)


def test_an_engine_may_say_that_it_does_not_look_for_aborts() -> None:
    checks.cancel_stops_it(Bench(subject_of(broken.NeverLooks, polls=False)))


def test_a_sample_may_say_that_it_is_random() -> None:
    samples = [Sample({"steps": 3}, deterministic=False)]
    checks.the_same_task_gives_the_same(Bench(subject_of(broken.AnswersDifferently, samples=samples)))


def test_a_subject_without_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        Bench(subject_of(broken.Sound, samples=[]))


@pytest.mark.parametrize(
    ("content", "declared", "right"),
    [
        (b"RIFF\x24\0\0\0WAVEfmt ", "audio/wav", True),
        (b"RIFF\x24\0\0\0WAVEfmt ", "audio/x-wav", True),
        (b"RIFF\x24\0\0\0WAVEfmt ", "image/png", False),
        (b"fLaC\0\0\0\x22", "audio/flac", True),
        (b"OggS\0\x02\0\0", "audio/ogg", True),
        (b"ID3\x03\0\0\0\0\0\0", "audio/mpeg", True),
        (b"\xff\xd8\xff\xe0\0\x10JFIF\0", "image/jpeg", True),
        (b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41", "video/mp4", True),
        (b"%PDF-1.7\n", "application/pdf", True),
        (b"anything", "application/pdf", False),
        (b"anything", "application/octet-stream", True),
        (b"anything", "application/vnd.nobody.knows", True),
        ("好".encode(), "text/markdown", True),
        (b'{"a": 1}', "application/geo+json", True),
    ],
)
def test_content_types(content: bytes, declared: str, right: bool) -> None:
    assert is_of_type(content, declared) is right
