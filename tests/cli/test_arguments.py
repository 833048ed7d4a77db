"""From what a person types to the fields of a task."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, cast

import pytest
from pydantic import BaseModel

from inferq.producer.cli.arguments import Given, bundle, parse_assignments
from inferq.producer.cli.batch import _looks
from inferq.producer.cli.files import files_of
from inferq.producer.client.errors import Unavailable
from inferq.producer.client.sync_client import Client
from inferq.schemas import BatchStatus, InputUrl, InvalidTask, Options, Task, TaskType, get_type


class PairOptions(Options):
    strength: float = 1.0


class PairTask(Task):
    task_type: Literal["pair"]
    source_url: InputUrl
    target_url: InputUrl
    options: PairOptions = PairOptions()


class WordsTask(Task):
    task_type: Literal["words"]
    text: str | None = None
    text_url: InputUrl | None = None


class Nothing(BaseModel):
    pass


PAIR = TaskType("pair", PairTask, Nothing, "x:y", arguments=("source_url", "target_url"))
WORDS = TaskType("words", WordsTask, Nothing, "x:y", arguments=("text",))


def test_one_task_for_each_input(tmp_path: Path) -> None:
    page = tmp_path / "page.png"
    page.write_bytes(b"x")
    made = bundle(get_type("ocr"), [str(page), "https://example.com/a.png"], given={})
    assert made == [
        {"image_url": Given(str(page), page)},
        {"image_url": Given("https://example.com/a.png")},
    ]


def test_two_inputs_make_a_pair(tmp_path: Path) -> None:
    made = bundle(PAIR, ["s3://b/1", "s3://b/2", "s3://b/3", "s3://b/4"], given={})
    assert [{name: given.text for name, given in parts.items()} for parts in made] == [
        {"source_url": "s3://b/1", "target_url": "s3://b/2"},
        {"source_url": "s3://b/3", "target_url": "s3://b/4"},
    ]
    with pytest.raises(InvalidTask, match="2 inputs a task"):
        bundle(PAIR, ["s3://b/1"], given={})
    assert list(bundle(PAIR, ["s3://b/1"], given={"source_url": "s3://b/0"})[0]) == ["target_url"]


def test_a_text_may_be_a_file(tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    file.write_text("words")
    assert bundle(WORDS, [str(file)], given={}) == [{"text_url": Given(str(file), file)}]
    assert bundle(WORDS, ["https://example.com/"], given={}) == [{"text_url": Given("https://example.com/")}]
    long = "a text " * 2000
    assert [list(parts) for parts in bundle(WORDS, [long, "\0"], given={})] == [["text"], ["text"]]


def test_a_missing_file_is_named() -> None:
    with pytest.raises(InvalidTask, match=r"'no-such\.png' is neither a file here nor a URL"):
        bundle(get_type("ocr"), ["no-such.png"], given={})


@pytest.mark.parametrize("name", ["report.txt", "notes.md", "folder/report.txt", "folder/", "张伟.txt"])
def test_a_word_like_a_files_name_is_not_taken_for_a_text(name: str) -> None:
    with pytest.raises(InvalidTask, match=r"there is no such file here; .*--set text="):
        bundle(get_type("ner"), [name], given={})


@pytest.mark.parametrize("text", ["张伟在北京。", "A report.", "3.14", "and/or", "see report.txt"])
def test_a_text_is_not_taken_for_a_files_name(text: str) -> None:
    assert bundle(get_type("ner"), [text], given={}) == [{"text": Given(text)}]


def test_a_field_of_text_is_never_read_as_json() -> None:
    assert parse_assignments(get_type("ocr"), ["pages=1"]) == {"options": {"pages": "1"}}
    assert parse_assignments(get_type("acestep"), ["lyrics=2024", "prompt=true", "seed=7"]) == {
        "lyrics": "2024",
        "prompt": "true",
        "seed": 7,
    }


def test_echo_reads_json_and_text() -> None:
    for text, value in (("3", 3), ('{"a": [1]}', {"a": [1]}), ("hello", "hello"), ("{", "{")):
        (parts,) = bundle(get_type("echo"), [text], given={})
        assert parts["payload"].value(None) == value  # type: ignore[arg-type]


def test_assignments_find_their_field_or_option() -> None:
    ocr = get_type("ocr")
    assert parse_assignments(ocr, ["annotated=true", "options.min_score=0.3", "time_limit=5"]) == {
        "time_limit": 5,
        "options": {"annotated": True, "min_score": 0.3},
    }
    for number in ("NaN", "-Infinity", "1e999", "[NaN]"):
        assert parse_assignments(ocr, [f"min_score={number}"]) == {"options": {"min_score": number}}
    assert parse_assignments(ocr, ["batch_id=b=1"]) == {"batch_id": "b=1"}
    for wrong in ("annotated", "=1", ""):
        with pytest.raises(InvalidTask, match="name=value"):
            parse_assignments(ocr, [wrong])
    with pytest.raises(InvalidTask, match=r"no such field or option; it has .*annotated"):
        parse_assignments(ocr, ["anotated=true"])


def test_no_inputs_make_one_task_and_too_many_are_refused() -> None:
    assert bundle(get_type("echo"), [], given={}) == [{}]
    with pytest.raises(InvalidTask, match="no further inputs"):
        bundle(get_type("echo"), ["x"], given={"payload": 1})


def test_hidden_is_what_is_hidden_below_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scans, here = tmp_path / ".data" / "scans", tmp_path / "here"
    (scans / ".git").mkdir(parents=True)
    here.mkdir()
    for name in ("a.png", ".DS_Store", ".git/b.png"):
        (scans / name).touch()
    monkeypatch.chdir(here)
    for source in (str(scans), "../.data/scans"):
        assert [path.name for path in files_of([source], set())] == ["a.png"]
    monkeypatch.chdir(scans)
    assert [path.name for path in files_of(["."], set())] == ["a.png"]


def test_a_gateway_that_is_away_is_waited_for_and_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    running = BatchStatus(
        batch_id="b", tenant="t", state="running", source="inferq:x", created_at=datetime.now(UTC)
    )
    away = Unavailable("cannot be reached", code="unavailable")
    answers = iter([running, away, away, running, running.model_copy(update={"state": "completed"})])

    def batch(_batch_id: str) -> BatchStatus:
        answer = next(answers)
        if isinstance(answer, Unavailable):
            raise answer
        return answer

    looks = _looks(cast(Client, SimpleNamespace(batch=batch)), "b", pause=0)
    assert [status.state for status in looks] == ["running", "running", "completed"]
    assert capsys.readouterr().err.count("cannot be reached") == 1
