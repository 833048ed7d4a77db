"""How tables are printed for people."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest

from inferq.producer.cli import batch
from inferq.producer.cli.output import duration_text, print_table
from inferq.schemas import BatchCounts, BatchStatus


def test_a_time_is_local_and_to_the_second(capsys: pytest.CaptureFixture[str]) -> None:
    moment = datetime(2026, 11, 25, 0, 30, 0, 123456, tzinfo=UTC)
    print_table(["at"], [[moment], [moment.astimezone(timezone(timedelta(hours=5)))]])
    assert capsys.readouterr().out.split("\n")[1:] == [f"{moment.astimezone():%Y-%m-%d %H:%M:%S}"] * 2 + [""]


def test_no_line_is_left_for_heads_that_are_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["", ""], [("state", "running"), ("[bold]", None)])
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["state", "running"],
        ["[bold]"],
    ]


def test_an_empty_table_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["task", "type"], [])
    assert capsys.readouterr().out == "none\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 min 0 s"), (95, "1 min 35 s"), (3_960, "1 h 6 min"), (187_200, "2 d 4 h")],
)
def test_a_duration_has_its_two_largest_units(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


@pytest.mark.parametrize("cached", [0, 3])
def test_a_batch_says_how_many_of_its_lines_the_result_cache_answered(
    capsys: pytest.CaptureFixture[str], cached: int
) -> None:
    status = BatchStatus(
        batch_id="b", tenant="default", state="running", source="inferq:b.jsonl", created_at=datetime.now(UTC),
        counts=BatchCounts(total=9, succeeded=5, cached=cached),
    )  # fmt: skip
    batch._show(status)
    assert ("from the cache 3" in " ".join(capsys.readouterr().out.split())) == bool(cached)
    assert ("3 from the cache" in batch._note(status)) == bool(cached)
