"""Tasks: what is valid, what is refused and how it is told, and when two are the same."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferq.schemas import InvalidTask, get_type, installed_types, new_task_id, parse_task
from inferq.schemas.publish import documents
from inferq.schemas.task import MAX_BODY_BYTES, input_fields

BARE = {"task_id": "ocr_001", "image_url": "https://example.com/images/id_card.jpg", "task_type": "ocr"}


def test_the_bare_message_is_a_whole_task() -> None:
    task = parse_task(json.dumps(BARE))
    assert json.loads(task.body()) == BARE
    assert task.inputs() == {"image_url": BARE["image_url"]}
    assert (task.priority, task.tenant, task.callback_events) == ("normal", "default", ("completed",))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"task_type": "unheard"}, "'unheard' is not known here; known are: .*echo.*ocr"),
        ({"task_type": 3}, "task_type"),
        ({"colour": "red"}, "colour: is unknown"),
        ({"options": {"colour": "red"}}, "options.colour: is unknown"),
        ({"task_id": ""}, "task_id"),
        ({"task_id": "a/b"}, "task_id"),
        ({"task_id": "x" * 129}, "task_id"),
        ({"task_id": "a\n"}, "task_id"),
        ({"task_id": None}, "task_id"),
        ({"image_url": "ftp://example.com/x"}, "image_url"),
        ({"image_url": "file:///etc/passwd"}, "image_url"),
        ({"image_url": ""}, "image_url"),
        ({"priority": "urgent"}, "priority: input should be 'high', 'normal' or 'low', got \"urgent\""),
        ({"tenant": "../other"}, "tenant"),
        ({"tenant": ""}, "tenant"),
        ({"callback_url": "javascript:alert(1)"}, "callback_url"),
        ({"callback_events": ["never"]}, "callback_events"),
        ({"expires_at": "2026-01-01T00:00:00"}, "expires_at.*timezone"),
        ({"expires_at": "0001-01-01T00:00:00+14:00"}, "expires_at"),
        ({"time_limit": 0}, "time_limit"),
        ({"time_limit": 1e9}, "time_limit"),
        ({"metadata": []}, "metadata"),
    ],
)
def test_what_is_wrong_is_refused_by_name(change: dict[str, object], complaint: str) -> None:
    with pytest.raises(InvalidTask, match=complaint):
        parse_task(json.dumps(BARE | change))


@pytest.mark.parametrize(
    ("change", "secret", "complaint"),
    [
        ({"a\nERROR b\x1b[2J": 1}, "\n", r'"a\nERROR b\u001b[2J": is unknown'),
        ({"x" * 500: 1}, "x" * 81, "is unknown"),
        ({"task_type": "q" * 500}, "q" * 81, "is not known"),
        ({"image_url": "ftp://u:pw@h/?sig=abc"}, "sig=abc", "got a text of 21 characters"),
        ({"metadata": "a private text"}, "private", "got a text of 14 characters"),
        ({"priority": "my secret\n"}, "secret", "got a text of 10 characters"),
        ({"time_limit": -1}, "text", "got -1"),
        ({"callback_events": {"a": "private"}}, "private", "got an object"),
    ],
)
def test_faults_quote_no_text_of_the_sender(change: dict[str, object], secret: str, complaint: str) -> None:
    with pytest.raises(InvalidTask) as caught:
        parse_task(json.dumps(BARE | change))
    assert secret not in caught.value.message
    assert complaint in caught.value.message


@pytest.mark.parametrize("field", ["task_id", "task_type", "image_url"])
def test_what_is_missing_is_named(field: str) -> None:
    with pytest.raises(InvalidTask, match=f"{field}: is missing"):
        parse_task({name: value for name, value in BARE.items() if name != field})


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"\xff", b"null", b"[]", b'"x"', b"1", b'{"a":' * 5000,
        b'{"task_id": "a", "task_type": "echo", "payload": NaN}',
        b'{"task_id": "a", "task_type": "echo", "payload": 1e999}',
        b'{"task_id": "a", "task_type": "echo", "payload": [-1.5E+400]}',
        b'{"task_id": "a", "task_type": "echo", "payload": ' + b"[" * 101 + b"]" * 101 + b"}",
        b'{"task_id": "a", "task_type": "echo", "payload": [-Infinity]}',
        b'{"task_id": "a", "task_type": "echo", "payload": "\\ud800"}',
    ],
)  # fmt: skip
def test_what_is_not_a_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidTask):
        parse_task(body)


def test_a_text_that_only_mentions_a_constant_is_fine() -> None:
    task = parse_task(b'{"task_id": "a", "task_type": "echo", "payload": "NaN and Infinity"}')
    assert json.loads(task.body())["payload"] == "NaN and Infinity"


def test_deep_and_wide_values_survive_as_long_as_a_result_can_hold_them() -> None:
    for payload in (
        b"[" * 98 + b"]" * 98,
        b"[" + b"[]," * 5000 + b"[]]",
        b'"' + b"[{" * 500 + b'"',
        b"1e100",
    ):
        task = parse_task(b'{"task_id": "a", "task_type": "echo", "payload": ' + payload + b"}")
        assert json.loads(task.body())["payload"] == json.loads(payload)


def test_a_body_may_have_exactly_so_many_bytes() -> None:
    def body(size: int) -> bytes:
        empty = json.dumps({"task_id": "a", "task_type": "echo", "payload": ""})
        return empty.replace('""', '"' + "x" * (size - len(empty)) + '"').encode()

    assert len(body(MAX_BODY_BYTES)) == MAX_BODY_BYTES
    parse_task(body(MAX_BODY_BYTES))
    with pytest.raises(InvalidTask, match="65537 bytes, the limit is 65536") as caught:
        parse_task(body(MAX_BODY_BYTES + 1))
    assert caught.value.code == "task_too_large"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@given(json_values, st.sampled_from(["high", "normal", "low"]))
def test_a_task_survives_its_journey_with_its_digest(payload: object, priority: str) -> None:
    task = parse_task({"task_id": "a", "task_type": "echo", "payload": payload, "priority": priority})
    again = parse_task(task.body())
    assert again == task
    assert again.digest() == task.digest()


def test_a_given_value_stays_in_the_body_even_where_it_is_the_default() -> None:
    said = BARE | {
        "priority": "normal",
        "tenant": "default",
        "time_limit": None,
        "options": {"annotated": False},
    }
    assert json.loads(parse_task(said).body()) == said


@pytest.mark.parametrize(
    ("task", "digest"),
    [
        (
            {"task_id": "a", "task_type": "echo"},
            "b2d5742141fdaf0c8481f637ae23abb84fdfd4e48a090146b01743ec4ce75522",
        ),
        (
            {
                "task_id": "a.1", "task_type": "echo", "payload": {"b": [1, 2.5, None, "Grüße 你好"], "a": True},
                "priority": "high", "tenant": "acme", "metadata": {"z": 1, "a": {}}, "batch_id": "a",
                "batch_line": 1, "created_at": "2026-01-01T00:00:00Z",
            },
            "a839fa92cda34f91be9f7e2c79d51dd1dfd03ad3be04707bf795dce24f036232",
        ),
        (
            BARE | {
                "priority": "normal", "tenant": "default", "options": {}, "time_limit": 2.5,
                "callback_url": "https://example.com/h", "callback_events": ["started", "completed"],
                "expires_at": "2026-01-01T00:00:00+01:00",
            },
            "d6929a740d6ae6262a7ecf61a77dd15b1e7e2303fcabff987bbad5135658df97",
        ),
    ],
)  # fmt: skip
def test_the_digest_is_that_of_earlier_versions(task: dict[str, object], digest: str) -> None:
    assert parse_task(task).digest() == digest


@given(json_values, json_values)
def test_other_content_has_another_digest(one: object, other: object) -> None:
    first = parse_task({"task_id": "a", "task_type": "echo", "payload": one})
    second = parse_task({"task_id": "a", "task_type": "echo", "payload": other})
    same = json.dumps(json.loads(first.body()), sort_keys=True) == json.dumps(
        json.loads(second.body()), sort_keys=True
    )
    assert (first.digest() == second.digest()) == same


@pytest.mark.parametrize(
    ("task", "complaint"),
    [
        ({"task_type": "echo", "time_limit": True}, "time_limit: input should be a number, got true"),
        ({"task_type": "echo", "delay": False}, "delay: input should be a number, got false"),
        (
            {"task_type": "acestep", "prompt": "a song", "seed": True},
            "seed: input should be a number, got true",
        ),
        (
            {"task_type": "acestep", "prompt": "a song", "options": {"steps": True}},
            "options.steps: input should be",
        ),
        (
            {"task_type": "ocr", "image_url": "s3://b/k", "options": {"min_score": True}},
            "options.min_score: input should be a number, got true",
        ),
    ],
)
def test_a_boolean_is_no_number(task: dict[str, object], complaint: str) -> None:
    with pytest.raises(InvalidTask) as caught:
        parse_task({"task_id": "a", **task})
    assert complaint in str(caught.value)


def test_a_payload_may_hold_booleans() -> None:
    payload = {"a": [True, 1, 1.5, {"b": False}]}
    task = parse_task({"task_id": "a", "task_type": "echo", "payload": payload, "metadata": payload})
    assert json.loads(task.body())["payload"] == json.loads(task.body())["metadata"] == payload


def test_a_value_that_fits_no_part_of_a_union_is_one_fault() -> None:
    urls = {"source_url": "s3://b/1", "target_url": "s3://b/2"}
    with pytest.raises(InvalidTask) as caught:
        parse_task({"task_id": "a", "task_type": "facefusion", **urls, "options": {"face": "x"}})
    assert str(caught.value) == (
        "options.face: input should be 'largest' or 'all', or input should be a valid integer, got \"x\""
    )


def test_a_time_that_is_none_is_told_its_form() -> None:
    for wrong in ("x", "tomorrow", "2030-01-31T"):
        with pytest.raises(
            InvalidTask, match="expires_at: must be a time with a zone, such as 2030-01-31T12"
        ):
            parse_task({"task_id": "a", "task_type": "echo", "expires_at": wrong})


def test_fresh_ids_are_valid_and_sort_by_time() -> None:
    ids = [new_task_id() for _ in range(1000)]
    assert ids == sorted(ids)
    assert len(set(ids)) == 1000
    parse_task({**BARE, "task_id": ids[0]})


def test_inputs_are_found_in_optional_fields_too() -> None:
    from inferq.schemas import InputUrl, Task

    class Many(Task):
        plain: str = ""
        one: InputUrl
        two: InputUrl | None = None

    assert input_fields(Many) == ("one", "two")


def test_published_schemas_agree_with_the_models() -> None:
    published = documents(installed_types())
    schema = jsonschema.Draft202012Validator(json.loads(published["task.ocr.schema.json"]))
    assert schema.is_valid(BARE)
    assert not schema.is_valid({**BARE, "colour": "red"})
    assert not schema.is_valid({**BARE, "task_id": "a b"})
    assert not schema.is_valid({k: v for k, v in BARE.items() if k != "image_url"})


def test_the_published_folder_is_checked(tmp_path: Path) -> None:
    import subprocess
    import sys

    def publish(*more: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-P", "-m", "inferq.schemas.publish", str(tmp_path), *more]
        return subprocess.run(argv, capture_output=True, text=True, check=False)

    assert publish("--check").returncode == 1
    assert publish().returncode == 0
    assert publish("--check").returncode == 0
    (tmp_path / "task.echo.schema.json").write_text("{}")
    (tmp_path / "left-over.json").write_text("{}")
    stale = publish("--check")
    assert stale.returncode == 1
    assert "left-over.json, task.echo.schema.json" in stale.stderr
    assert publish().returncode == 0
    assert publish("--check").returncode == 0


def test_an_unknown_type_is_an_error_that_names_the_known() -> None:
    with pytest.raises(InvalidTask, match=r"known are: .*echo"):
        get_type("unheard")
