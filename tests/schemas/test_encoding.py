"""An output that travels as JSON text is stored as if the model had written it."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import JsonValue, TypeAdapter

from inferq.schemas import Event, Result
from inferq.schemas.encoding import result_json, to_json
from inferq.schemas.status import INLINE_EVENT_OUTPUT_BYTES

JSON: TypeAdapter[JsonValue] = TypeAdapter(JsonValue)
ANY_TEXT = st.text(st.characters(exclude_categories=[]))
TEXT = st.text()


def values(text: st.SearchStrategy[str]) -> st.SearchStrategy[Any]:
    plain = st.none() | st.booleans() | st.integers() | st.integers(2**63, 2**90) | st.floats() | text
    return st.recursive(
        plain, lambda inner: st.lists(inner) | st.dictionaries(text, inner), max_leaves=20
    ).filter(lambda value: value is not None)


def result(output: Any = None, metadata: dict[str, Any] | None = None) -> Result:
    return Result(
        task_id="t:1.a", task_type="echo", tenant="default", status="succeeded", attempts=1,
        finished_at=datetime(2026, 11, 20, 12, tzinfo=UTC), output=output, metadata=metadata or {},
    )  # fmt: skip


METADATA = st.dictionaries(ANY_TEXT, ANY_TEXT | st.none(), max_size=3)


@given(values(TEXT), METADATA)
@example({"output": None}, {"output": None, "a": "\ud83d"})
def test_a_text_is_stored_as_the_model_would_write_it(output: Any, metadata: dict[str, Any]) -> None:
    assert (
        result_json(result(metadata=metadata), JSON.dump_json(output))
        == to_json(result(JSON.validate_json(JSON.dump_json(output)), metadata)).encode()
    )


@given(values(ANY_TEXT))
@example("\ud83d")
@example(["\udc00\ud83d"])
@example({"\ud83d": 1})
@example([float("nan")])
@example(float("-inf"))
@example({"\ud83d": float("inf")})
def test_what_not_every_reader_takes_is_stored_in_a_form_that_all_do(output: Any) -> None:
    text = json.dumps(output).encode()  # as NaN, Infinity and \ud83d

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    stored = result_json(result(), text)
    kept = Result.model_validate_json(stored).output
    assert kept == json.loads(stored, parse_constant=refuse)["output"]
    assert kept == json.loads(to_json(result(json.loads(text))))["output"]


def test_a_result_has_one_output() -> None:
    with pytest.raises(ValueError, match="output of its own"):
        result_json(result("one"), b'"two"')


ROUND_THE_LIMIT = [
    [piece] * count
    for piece in ("a", "é", "字", "😀", '"', "\x1f", 1, 0.00001, 1e16, None, {"k": [1.5]})
    for size in (len(json.dumps([piece, piece])) - len(json.dumps([piece])),)
    for count in range(INLINE_EVENT_OUTPUT_BYTES // size - 2, INLINE_EVENT_OUTPUT_BYTES // size + 3)
]


@pytest.mark.parametrize("unit", ["a", "é", "字", "😀"])
@pytest.mark.parametrize("over", [-1, 0, 1])
def test_the_event_carries_the_output_up_to_the_same_size(unit: str, over: int) -> None:
    whole = unit * ((INLINE_EVENT_OUTPUT_BYTES - 2) // (len(json.dumps(unit)) - 2))
    output = whole + "a" * (INLINE_EVENT_OUTPUT_BYTES + over - len(json.dumps(whole)))
    event = Event.of_result(result(), JSON.dump_json(output))
    assert event == Event.of_result(result(output))
    assert event.data.output == (output if over <= 0 else None)


def test_the_event_of_a_text_is_that_of_the_value() -> None:
    for output in [*ROUND_THE_LIMIT, *(2 * output for output in ROUND_THE_LIMIT)]:
        text = JSON.dump_json(output)
        assert Event.of_result(result(), text) == Event.of_result(result(output)), output[:1]


@given(values(TEXT), st.integers(1, 300))
def test_the_event_of_any_text_is_that_of_the_value(output: Any, times: int) -> None:
    text = JSON.dump_json([output] * times)
    assert Event.of_result(result(), text) == Event.of_result(result(JSON.validate_json(text)))
