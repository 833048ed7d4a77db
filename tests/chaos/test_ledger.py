"""The reckoning, tried on ledgers that no real run should write."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferq.schemas import PRIORITIES
from tests.chaos import plan
from tests.chaos.ledger import Entry, Kind, Ledger
from tests.chaos.plan import Load, PlannedTask, Trouble, draw
from tests.chaos.reckoning import Fault, Reckoning, reckon, recovery
from tests.chaos.records import note_record

A = {"a": PlannedTask("a")}
TROUBLED: list[Trouble] = ["hopeless", "invalid", "poison", "container"]


def entries(*lines: str) -> list[Entry]:
    """Entries of task `a` from `kind what run content`, with `-` for what is empty."""
    made = []
    for moment, line in enumerate(lines):
        kind, *rest = line.split()
        what, run, content = ["" if part == "-" else part for part in [*rest, "-", "-", "-"][:3]]
        made.append(Entry(cast(Kind, kind), "a", float(moment), run, what, content))
    return made


GOOD = (
    "sent",
    "confirmed",
    "start 1 r1",
    "result folder r1 c1",
    "event task.succeeded r1",
    "result end r1 c1",
)


def faults(reckoning: Reckoning) -> set[Fault]:
    return {finding.fault for finding in reckoning.findings}


def test_a_task_that_ended_once_gives_no_finding() -> None:
    reckoning = reckon(entries(*GOOD), A)
    assert reckoning.findings == ()
    assert (reckoning.confirmed, reckoning.ended, reckoning.repeated) == (1, 1, 0)


CALLED = {"a": PlannedTask("a", callback=True)}


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        (("callback task.succeeded m1", "callback task.succeeded m1"), None),
        ((), "lost"),
        (("callback task.succeeded m1", "callback task.succeeded m2"), "unexpected"),
        (("callback task.failed m1",), "unexpected"),
    ],
)
def test_an_end_is_called_back_under_one_id_and_as_it_was(
    lines: tuple[str, ...], fault: Fault | None
) -> None:
    assert faults(reckon(entries(*GOOD, *lines), CALLED)) == ({fault} if fault else set())


def test_a_confirmed_task_without_an_end_is_lost() -> None:
    reckoning = reckon(entries("sent", "confirmed", "start 1 r1"), A)
    assert reckoning.count("lost") == 1


def test_a_dead_letter_alone_is_no_end() -> None:
    reckoning = reckon(entries("sent", "confirmed", "start 1 r1", "dead delivery_limit"), A)
    assert reckoning.count("lost") == 1
    assert "delivery_limit" in str(reckoning.findings[0])


def test_a_task_that_nobody_confirmed_may_end_or_not() -> None:
    assert reckon(entries("sent"), A).findings == ()
    reckoning = reckon(entries("sent", "start 1 r1", "result folder r1 c1"), A)
    assert reckoning.findings == ()
    assert reckoning.unconfirmed == ("a",)


def test_an_end_that_nobody_asked_for_is_unexpected() -> None:
    assert faults(reckon(entries(*GOOD), {})) == {"unexpected"}
    assert faults(reckon(entries(*GOOD[2:]), A)) == {"unexpected"}


@pytest.mark.parametrize(
    "second",
    [
        ("start 1 r2", "result folder r2 c2"),
        ("start 1 r2", "event task.succeeded r2"),
        ("result folder r1 c2",),
    ],
)
def test_a_record_that_was_another_before_is_a_second_result(second: tuple[str, ...]) -> None:
    reckoning = reckon(entries(*GOOD, *second), A)
    assert reckoning.count("second result") == 1


def test_a_failure_that_was_another_before_is_a_second_result() -> None:
    planned = {"a": PlannedTask("a", trouble="invalid")}
    failed = ("sent", "confirmed", "start 1 r1", "dead never", "failure never - c1")
    assert reckon(entries(*failed), planned).findings == ()
    assert reckon(entries(*failed, "failure never - c2"), planned).count("second result") == 1


def test_more_starts_than_needed_are_counted_and_the_task_recovered() -> None:
    reckoning = reckon(entries("start 1 r0", *GOOD), A)
    assert reckoning.findings == ()
    assert (reckoning.repeated, reckoning.recovered) == (1, ("a",))


def test_the_starts_that_a_troubled_task_needs_are_not_counted() -> None:
    planned = {"a": PlannedTask("a", trouble="crash")}
    assert reckon(entries("start 1 r0", *GOOD), planned).repeated == 0


def test_starts_are_not_counted_where_their_number_is_open() -> None:
    planned = {"a": PlannedTask("a", trouble="container")}
    died = ["start 1 r1"] * 25
    reckoning = reckon(entries("sent", "confirmed", *died, "dead poison", "failure poison - c"), planned)
    assert (reckoning.findings, reckoning.repeated) == ((), 0)


@pytest.mark.parametrize(
    "lines",
    [
        ("sent", "confirmed", "failure poison", "dead poison"),
        (*GOOD, "failure poison", "dead poison"),
        (*GOOD, "dead poison"),
        ("sent", "confirmed", "result folder r1 c1"),
    ],
)
def test_an_end_without_its_cause_is_unexpected(lines: tuple[str, ...]) -> None:
    assert "unexpected" in faults(reckon(entries(*lines), A))


def test_an_attempt_that_an_outage_used_up_is_burnt() -> None:
    again = (*GOOD, "attempts 2")
    assert faults(reckon(entries(*again), A)) == {"attempt burnt"}
    own = {"a": PlannedTask("a", trouble="transient")}
    assert reckon(entries(*again), own).findings == ()
    assert faults(reckon(entries(*GOOD, "attempts 3"), own)) == {"attempt burnt"}
    killed = [*entries(*again), Entry("fault", "", 0.5, "1", "engine killed")]
    assert reckon(killed, A).findings == ()


def test_a_task_that_the_gateway_denies_is_unexpected() -> None:
    assert faults(reckon(entries(*GOOD, "denied 404"), A)) == {"unexpected"}


@pytest.mark.parametrize(
    ("lines", "right"),
    [
        (("failure expired", "dead expired"), True),
        (("failure dropped", "dead maxlen"), True),
        ((*GOOD[2:], "dead maxlen"), True),  # a second copy of the message
        (("failure dropped", "dead expired"), False),
        (("failure expired",), False),
        (("failure never", "dead never"), False),
        ((*GOOD[2:], "failure expired", "dead expired"), False),
        (("dead expired",), False),
    ],
)
def test_a_task_whose_message_was_dropped_fails_and_its_dead_letter_says_why(
    lines: tuple[str, ...], right: bool
) -> None:
    log = entries("sent", "confirmed", *lines)
    assert (reckon(log, {"a": PlannedTask("a", droppable=True)}).findings == ()) is right
    assert right is False or reckon(log, A).findings != ()


def test_what_an_engine_started_is_no_part_of_a_task_s_history() -> None:
    assert reckon([*entries(*GOOD), Entry("helper", "a", 1.0, "r1", "77", "76")], A).findings == ()


@pytest.mark.parametrize("trouble", TROUBLED)
def test_a_troubled_task_has_to_fail_in_its_own_way_and_leave_a_dead_letter(trouble: Trouble) -> None:
    task = PlannedTask("a", trouble=trouble)
    begun = ("sent", "confirmed", "start 1 r1")
    good = reckon(entries(*begun, f"dead {task.code}", f"failure {task.code}"), {"a": task})
    assert good.findings == ()
    for bad in (
        ("result folder r1 c1",),
        ("failure other", "dead other"),
        (f"failure {task.code}",),
        (f"failure {task.code}", "dead other"),
    ):
        assert faults(reckon(entries(*begun, *bad), {"a": task})) == {"unexpected"}


_LINES = st.lists(
    st.sampled_from(["sent", "confirmed", "start 1 r1", "start 2 r2", "result folder r1 c1",
                     "result folder r2 c2", "failure never - c3", "event task.succeeded r1", "dead never"]),
    max_size=12,
)  # fmt: skip


@given(_LINES, st.sampled_from(["none", *TROUBLED]))
def test_a_ledger_without_findings_keeps_the_promise(lines: list[str], trouble: Trouble) -> None:
    reckoning = reckon(entries(*lines), {"a": PlannedTask("a", trouble=trouble)})
    if reckoning.findings:
        return
    kinds = {line.split()[0] for line in lines}
    if "confirmed" in kinds:
        assert kinds & {"result", "failure"}
    assert len({line for line in lines if line.startswith("result")}) <= 1
    assert not {"result", "failure"} <= kinds
    assert not {"result", "dead"} <= kinds


@given(_LINES, st.randoms())
def test_the_order_of_what_several_processes_wrote_does_not_matter(lines: list[str], random: Random) -> None:
    shuffled = random.sample(lines, len(lines))
    assert sorted(map(str, reckon(entries(*lines), A).findings)) == sorted(
        map(str, reckon(entries(*shuffled), A).findings)
    )


@given(_LINES, _LINES)
def test_tasks_are_reckoned_apart(lines: list[str], others: list[str]) -> None:
    b = [Entry(e.kind, "b", e.at, e.run, e.what, e.content) for e in entries(*others)]
    both = reckon([*entries(*lines), *b], {**A, "b": PlannedTask("b")})
    alone = reckon(entries(*lines), A)
    assert [f for f in both.findings if f.task == "a"] == list(alone.findings)


def test_recovery_is_counted_from_the_end_of_each_fault() -> None:
    def at(kind: Kind, moment: float) -> Entry:
        return Entry(kind, "", moment)

    log = [at("start", 1), at("fault", 2), at("mended", 4), at("start", 4.5), at("mended", 5), at("start", 8)]
    assert recovery(log) == [0.5, 3.0]
    assert recovery([at("mended", 9), *log]) == [0.5, 3.0]


def test_a_plan_is_drawn_from_its_seed_alone(tmp_path: Path) -> None:
    load = Load(tasks=200, seconds=10, busy=1.0, troubles={"invalid": 7, "container": 1})
    tasks = draw("x", load, Random(5))
    assert tasks == draw("x", load, Random(5))
    assert tasks != draw("x", load, Random(6))
    assert len({task.id for task in tasks}) == 200
    assert [task.due for task in tasks] == sorted(task.due for task in tasks)
    assert sum(task.trouble == "invalid" for task in tasks) == 7
    assert {task.priority for task in tasks} == set(PRIORITIES)
    assert sum(task.seconds for task in tasks) == pytest.approx(10, rel=0.3)
    plan.write(tmp_path / "plan", tasks)
    assert plan.read(tmp_path / "plan") == tasks


def test_entries_come_back_as_they_were_written(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    ledger.note("sent", "a")
    ledger.note("confirmed", "a")
    note_record(ledger, "tasks/default/a/result.json", b'{"output": {"run": "r1"}}', seen_by="folder")
    note_record(ledger, "tasks/default/a/failure.json", b'{"error": {"code": "never"}}', seen_by="folder")
    note_record(ledger, "tasks/default/a/artifacts/1/note.txt", b"a note", seen_by="folder")
    with ledger.path.open("ab") as file:
        file.write(b'{"kind": "start", "ta')
    read = ledger.read()
    assert [(e.kind, e.task, e.run, e.what) for e in read] == [
        ("sent", "a", "", ""),
        ("confirmed", "a", "", ""),
        ("result", "a", "r1", "folder"),
        ("failure", "a", "", "never"),
    ]
    assert all(entry.content for entry in read[2:])
    assert ledger.confirmed() == {"a"}
    ledger.close()


def test_an_entry_of_an_unknown_kind_is_an_error(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger")
    ledger.path.write_text('{"kind": "guess", "task": "a", "at": 1}\n')
    with pytest.raises(ValueError, match="guess"):
        ledger.read()
    ledger.close()
