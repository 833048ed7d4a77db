"""`inferq canary compare`: tasks that both tracks do, and whether their outputs agree."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from inferq import NotEnded
from inferq.producer.canary import Verdict
from inferq.producer.canary_outputs import (
    MAX_TASKS,
    Answer,
    Pair,
    first_difference,
    outputs_verdict,
    read_tasks,
    replay,
)
from inferq.producer.cli import canary as command
from inferq.schemas import InvalidTask, Result, TaskStatus
from tests.installation import inferq_here

TRACKS = ("canary", "stable")


class FakeClient:
    """A gateway whose tasks end at once, each on the next of some tracks. `answer` makes a result's fields."""

    def __init__(self, *tracks: str | None, answer: Callable[[str | None, Any], dict[str, Any]]) -> None:
        self.submitted: list[dict[str, Any]] = []
        self.cancelled: list[str] = []
        self.hangs: set[int] = set()
        self._tracks = itertools.cycle(tracks)
        self._answer = answer
        self._results: dict[str, Result] = {}

    def submit(self, task_type: str, **fields: Any) -> TaskStatus:
        task_id, track = f"t{len(self.submitted)}", next(self._tracks)
        self.submitted.append(fields)
        self._results[task_id] = Result.model_validate(
            {
                "task_id": task_id, "task_type": task_type, "tenant": "default", "status": "succeeded", "attempts": 1,
                "finished_at": datetime.now(UTC), "track": track, **self._answer(track, fields.get("payload")),
            }
        )  # fmt: skip
        return TaskStatus(task_id=task_id, task_type=task_type, tenant="default", state="queued")

    def wait(self, task_id: str, timeout: float | None = None) -> TaskStatus:
        if int(task_id[1:]) in self.hangs:
            raise NotEnded(f"task {task_id!r} is queued after {timeout} s", code="not_ended")
        return TaskStatus(task_id=task_id, task_type="echo", tenant="default", state="succeeded")

    def result(self, task_id: str) -> Result:
        return self._results[task_id]

    def cancel(self, task_id: str) -> TaskStatus:
        self.cancelled.append(task_id)
        return self.wait(task_id)


def outputs(answer: Callable[[str | None, Any], Any]) -> Callable[[str | None, Any], dict[str, Any]]:
    return lambda track, payload: {"output": answer(track, payload)}


def run(client: FakeClient, count: int, rounds: int = 10) -> tuple[list[Pair], list[int]]:
    pairs = read_tasks([{"payload": number} for number in range(count)], "echo")
    missing = replay(client, "echo", pairs, TRACKS, rounds=rounds, seconds=60, priority="low")
    return pairs, list(missing)


def answers(pairs: list[Pair]) -> list[tuple[Answer, str]]:
    return [pair.judge(*TRACKS, 0.01) for pair in pairs]


def test_a_task_is_repeated_only_until_both_tracks_have_done_it() -> None:
    client = FakeClient("stable", "canary", "stable", answer=outputs(lambda _, payload: payload))
    pairs, missing = run(client, 4)
    assert answers(pairs) == [("same", "")] * 4
    assert missing == sorted(missing, reverse=True)
    assert missing[-1] == 0
    repeats = Counter(fields["payload"] for fields in client.submitted)
    assert repeats == {pair.fields["payload"]: sum(map(len, pair.task_ids.values())) for pair in pairs}
    assert all(fields["priority"] == "low" for fields in client.submitted)


def test_a_difference_is_named_with_the_tasks_that_show_it() -> None:
    def answer(track: str | None, payload: Any) -> Any:
        return {"lines": ["same", "new" if track == "canary" and payload == 1 else "old"]}

    pairs, _ = run(FakeClient("stable", "canary", "stable", answer=outputs(answer)), 2)
    assert answers(pairs) == [("same", ""), ("different", "output.lines.1")]
    assert pairs[1].task_ids.keys() == {"canary", "stable"}


def test_a_failure_and_another_artifact_are_differences_too() -> None:
    def failing(track: str | None, _payload: Any) -> dict[str, Any]:
        error = {"code": "engine_error", "message": "m", "retryable": True}
        return {"status": "failed", "error": error} if track == "canary" else {"output": 1}

    def drawing(track: str | None, _payload: Any) -> dict[str, Any]:
        picture = {"name": "a.png", "url": "u", "content_type": "image/png", "bytes": 1, "sha256": str(track)}
        return {"artifacts": [picture]}

    for answer, place in ((failing, "artifacts"), (drawing, "artifacts.a.png")):
        pairs, _ = run(FakeClient("stable", "canary", answer=answer), 1)
        assert answers(pairs) == [("different", place)]


def test_what_the_stable_track_does_not_repeat_itself_is_set_aside() -> None:
    numbers = itertools.count()
    client = FakeClient("stable", "stable", "canary", answer=outputs(lambda *_: next(numbers)))
    pairs, _ = run(client, 1)
    assert answers(pairs) == [("unstable", "output")]


@pytest.mark.parametrize("track", ["stable", None, "other"])
def test_without_a_canary_it_ends_after_its_rounds(track: str | None) -> None:
    client = FakeClient(track, answer=outputs(lambda *_: 1))
    pairs, missing = run(client, 3, rounds=2)
    assert answers(pairs) == [("missing", "")] * 3
    assert (missing, len(client.submitted)) == ([3, 3], 6)


def test_an_answer_of_the_result_cache_is_no_run_of_its_track() -> None:
    pairs, _ = run(
        FakeClient("canary", "stable", answer=lambda *_: {"output": 1, "cached": True}), 1, rounds=2
    )
    assert answers(pairs) == [("missing", "")]


def test_tasks_that_did_not_end_in_time_are_cancelled() -> None:
    client = FakeClient("stable", answer=outputs(lambda *_: 1))
    client.hangs = {1}
    with pytest.raises(NotEnded):
        run(client, 3)
    assert client.cancelled == ["t1", "t2"]


def test_only_the_work_of_a_line_is_submitted() -> None:
    line = {
        "task_id": "mine", "task_type": "echo", "payload": 1, "options": {"x": 1}, "callback_url": "https://e.org",
        "batch_id": "b", "metadata": {"k": 1}, "priority": "high", "expires_at": "2026-01-01T00:00:00Z",
    }  # fmt: skip
    (pair,) = read_tasks([line], "echo")
    assert pair.fields == {"payload": 1, "options": {"x": 1}}


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], "the file has 0 tasks"),
        ([{"payload": 1}] * (MAX_TASKS + 1), "the file has 1,001 tasks"),
        ([{"payload": 1}, ["payload"]], "line 2 is no JSON object"),
        ([{"task_type": "ocr"}], "line 1 is of type 'ocr', not 'echo'"),
    ],
)
def test_a_file_that_cannot_be_compared_is_a_clear_error(lines: list[Any], said: str) -> None:
    with pytest.raises(InvalidTask, match=said):
        read_tasks(lines, "echo")


@pytest.mark.parametrize(
    ("one", "other", "place"),
    [
        ({"a": [1, 2.0]}, {"a": [1, 2.01]}, ""),
        ({"a": [1, 2.0]}, {"a": [1, 2.1]}, "a.1"),
        ({"score": 0.001}, {"score": 0.009}, ""),
        ([1, 2], [1], "1"),
        ({"a": 1}, {"a": 1, "b": 2}, "b"),
        ("text", "Text", "."),
        (True, 1, "."),
        (None, None, ""),
        ({"a": {"b": None}}, {"a": {"b": 0}}, "a.b"),
    ],
)
def test_outputs_agree_but_for_small_differences_of_numbers(one: Any, other: Any, place: str) -> None:
    assert first_difference(one, other, 0.01) == place
    assert first_difference(other, one, 0.01) == place


VERDICTS: list[tuple[dict[Answer, int], float, Verdict]] = [
    ({"same": 20}, 1.0, "good"),
    ({"same": 19, "unstable": 1}, 1.0, "good"),
    ({"same": 19, "different": 1}, 1.0, "worse"),
    ({"same": 19, "different": 1}, 0.95, "good"),
    ({"same": 19, "missing": 1}, 1.0, "unclear"),
    ({"same": 90, "different": 4, "missing": 6}, 0.95, "unclear"),
    ({"same": 90, "different": 6, "missing": 4}, 0.95, "worse"),
    ({"unstable": 3}, 1.0, "unclear"),
    ({"missing": 3}, 1.0, "unclear"),
    ({"different": 3}, 1.0, "worse"),
]


@pytest.mark.parametrize(("counts", "least", "verdict"), VERDICTS)
def test_the_verdict_is_clear_only_if_missing_tasks_cannot_change_it(
    counts: dict[Answer, int], least: float, verdict: Verdict
) -> None:
    assert outputs_verdict(Counter(counts), least) == verdict


def test_the_command_names_a_line_that_is_no_json(tmp_path: Path) -> None:
    file = tmp_path / "tasks.jsonl"
    file.write_text('{"payload": 1}\n\n{"payload": \n')
    printed = inferq_here({}, "canary", "compare", "echo", str(file))
    assert (printed.returncode, printed.stdout) == (1, "")
    assert f"{file}, line 3:" in printed.stderr


@pytest.mark.parametrize(
    ("track", "status", "said"),
    [
        ("canary", 0, "verdict: good: 2 same, 0 different, 0 unstable, 0 missing\n"),
        ("v2", 4, "verdict: unclear: 0 same, 0 different, 0 unstable, 2 missing\n"),
    ],
)
def test_the_command_ends_with_the_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, track: str, status: int, said: str
) -> None:
    client = FakeClient("stable", track, "stable", answer=outputs(lambda _, payload: payload))
    monkeypatch.setattr(command, "Client", lambda: nullcontext(client))
    file = tmp_path / "tasks.jsonl"
    file.write_text('{"payload": 1}\n{"payload": 2}\n')
    printed = inferq_here({}, "canary", "compare", "echo", str(file), "--rounds", "3")
    assert (printed.returncode, said in printed.stdout) == (status, True), printed.stdout + printed.stderr
