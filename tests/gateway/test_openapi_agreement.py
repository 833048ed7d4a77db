"""Whether the schemas of the OpenAPI document and the gateway's own checks accept the same bodies."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inferq.producer.gateway.batch_request import requested_batch
from inferq.producer.gateway.problems import problem_of
from inferq.producer.gateway.task_request import requested_task
from inferq.schemas import Batch, InferqError, Task
from tests.gateway.edges import ODD, edges, resolved, validator_of

TENANT = "t"

BASES: dict[str, dict[str, Any]] = {
    "EchoTask": {"task_type": "echo"},
    "NerTask": {"task_type": "ner", "text": "a"},
    "OcrTask": {"task_type": "ocr", "image_url": "inferq:a"},
    "FacefusionTask": {"task_type": "facefusion", "source_url": "inferq:a", "target_url": "inferq:b"},
    "AceStepTask": {"task_type": "acestep", "prompt": "calm piano"},
    "Batch": {"source": "inferq:x"},
}
"""A body for each component, to which the tests make changes."""

BEYOND_SCHEMAS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "the tenant is the API key's": (r"tenant_mismatch", "EchoTask", {"tenant": "other"}),
    "a request can be sent to the URL": (r"\w+ callback_url: ", "EchoTask", {"callback_url": "http://a:0/"}),
    "whole numbers have no point": (
        r"invalid_task options\.(face|pages): ",
        "FacefusionTask",
        {"options": {"face": 1.0}},
    ),
    "pages count from 1, and ranges forward": (
        r"invalid_task options\.pages: ",
        "OcrTask",
        {"options": {"pages": "3-1"}},
    ),
    "format characters alone are no text": (
        r"invalid_task text(s\[\d+\]|s)?: .*only white space",
        "NerTask",
        {"text": "\u200b"},
    ),
    "a term has one type": (
        r"invalid_task options\.dictionary: ",
        "NerTask",
        {"options": {"dictionary": {"A": ["a"], "B": ["a"]}}},
    ),
    "terms have visible characters at their ends": (
        r"invalid_task options\.dictionary\S+ a term must begin",
        "NerTask",
        {"options": {"dictionary": {"A": ["\u200b"]}}},
    ),
    "the time zone exists": (
        r"invalid_batch window\.time_zone: ",
        "Batch",
        {"window": {"start": "22:00", "end": "06:00", "time_zone": "Mars/Base"}},
    ),
    "the key is one of S3": (
        r"invalid_batch source: the key of an s3: URL",
        "Batch",
        {"source": "s3://scans/../in.jsonl"},
    ),
    "objects of a prefix are inputs of a type": (
        r"invalid_batch task_type: ",
        "Batch",
        {"source": "s3://scans/in/"},
    ),
    "defaults fit the task type": (
        r"invalid_batch defaults: (?!.*cannot be a default)",
        "Batch",
        {"defaults": {"priority": "urgent"}},
    ),
    "the task type of the defaults is installed": (
        r"unknown_task_type",
        "Batch",
        {"defaults": {"task_type": "nonsense"}},
    ),
}
"""Rules that JSON Schema cannot say, or only at a length that nobody reads: how the gateway says them, and an
example."""

_TIMES = [
    "2030-01-31T12:00:00Z", "2030-01-31", "2030-01-31T12:00:00", "1969-12-31T23:59:59Z", "9001-01-01T00:00:00Z",
    "9000-12-31T23:59:59Z", "1970-01-01T00:00:00+14:00", "2030-02-30T00:00:00Z", 1893456000, "1893456000",
]  # fmt: skip
_IDS = [
    "a" * 128,
    "a" * 129,
    "a" * 116,
    "a" * 117,
    "a/b",
    "a.1:-_",
    "night-20260101T000000Z",
    "ä",
    "a\n",
    TENANT,
]
_URLS = [
    "https://example.com/a", "http://user@host:0/", "https://", "http://a b/", "https://a.example/\n",
    "s3://bucket/key", "inferq:a", "inferq:", "data:,a", "ftp://a/b", "S3://bucket/key", "HTTPS://A/",
]  # fmt: skip
_TEXTS = ["a", "\u200b", "\xa0", "  \n", "张伟", "    a", "a b c", "  abcde  ", "abcde"]
_CLOCKS = ["22:00", "24:00", "00:00", "6:00", "06:60", "22:00\n", "２２:００"]
SAMPLES: dict[str, list[Any]] = {
    **dict.fromkeys(("task_id", "batch_id", "tenant"), _IDS),
    **dict.fromkeys(("created_at", "expires_at"), _TIMES),
    **dict.fromkeys(("callback_url", "image_url", "text_url", "source_url", "target_url"), _URLS),
    **dict.fromkeys(("text", "prompt", "lyrics"), _TEXTS),
    **dict.fromkeys(("start", "end"), _CLOCKS),
    "texts": [["a", ""], ["a", "b"]],
    "time_zone": ["Europe/Berlin", "Mars/Base"],
    "pages": ["1-3,7", "5-", "0", "3-1", "1,", "999999", "1000000", 5, 0, 999_999, 1_000_000],
    "dictionary": [
        {"DRUG": ["a"]}, {"DRUG": [" a"]}, {"DRUG": ["a" * 65]}, {"1": ["a"]}, {"A": ["a"], "B": ["a"]}, {"D": [""]},
    ],
    "source": ["inferq:x", "s3://scans/in.jsonl", "s3://scans/in/", "s3://scans", "s3:x", "s3://", "s3:///a", "a"],
    "defaults": [
        {"options": {}}, {"payload": 1}, {"nonsense": 1}, {"task_type": "ocr"}, {"task_type": None},
        {"task_id": "a"}, {"tenant": "t"}, {"batch_id": "a"}, {"batch_line": 1}, {"priority": "urgent"},
    ],
    "batch_line": [None, 1],
    "schedule": [None, "night"],
    "nonsense": [1],
}  # fmt: skip
"""Values for the fields whose schemas have patterns, formats and rules, by the name of the field."""


def parsed(component: str, body: dict[str, Any]) -> Task | Batch:
    """The task or batch that the gateway reads in a body. Raises InferqError."""
    return (requested_batch if component == "Batch" else requested_task)(body, tenant=TENANT)


def faults_in(component: str, body: dict[str, Any]) -> list[str]:
    """Why the gateway refuses a body; empty if it accepts it."""
    try:
        parsed(component, body)
    except InferqError as error:
        problem = problem_of(error)
        faults = [f"{problem.code} {fault.field}: {fault.detail}" for fault in problem.errors or ()]
        return faults or [problem.code]
    return []


@pytest.fixture(scope="session")
def bodies(openapi_document: dict[str, Any]) -> Mapping[str, st.SearchStrategy[dict[str, Any]]]:
    """Bodies near the edges of each component's schema."""
    components = openapi_document["components"]["schemas"]

    def values(name: str, schema: dict[str, Any]) -> st.SearchStrategy[Any]:
        samples = SAMPLES.get(name, [])
        found = st.sampled_from([*edges(schema, components), *samples, *samples, *ODD])
        for part in [schema, *schema.get("anyOf", [])]:
            inner = resolved(part, components)
            if inner.get("properties"):
                base = {"start": "22:00", "end": "06:00"} if "start" in inner["properties"] else {}
                found = found | changed(base, inner)
        return found

    def changed(base: dict[str, Any], schema: Any) -> st.SearchStrategy[dict[str, Any]]:
        fields = {"batch_line": {}, "schedule": {}, "nonsense": {}} | schema["properties"]
        by_name = {name: values(name, part) for name, part in sorted(fields.items())}
        one = st.one_of(
            *(st.tuples(st.just(name), strategy | st.just(...)) for name, strategy in by_name.items())
        )
        return st.lists(one, max_size=3).map(lambda changes: _applied(base, dict(changes)))

    return {name: changed(base, components[name]) for name, base in BASES.items()}


def _applied(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in (base | changes).items() if value is not ...}


@pytest.mark.parametrize("component", BASES)
@settings(max_examples=60)
@given(data=st.data())
def test_a_schema_and_the_gateway_allow_the_same_bodies(
    openapi_document: dict[str, Any],
    bodies: Mapping[str, st.SearchStrategy[dict[str, Any]]],
    component: str,
    data: st.DataObject,
) -> None:
    body = data.draw(bodies[component])
    validator = validator_of(openapi_document, component)
    faults = faults_in(component, body)
    if validator.is_valid(body):
        reasons = [reason for reason, *_ in BEYOND_SCHEMAS.values()]
        assert not [fault for fault in faults if not any(re.match(reason, fault) for reason in reasons)]
    elif not faults:
        # Numbers may be written as texts, times as numbers, and so on. What is read has the form of the schema.
        read = json.loads(parsed(component, body).model_dump_json(exclude_unset=True))
        for name in ("batch_line", "schedule"):
            if name in read:
                assert read.pop(name) is None
        assert not [error.message for error in validator.iter_errors(read)]


@pytest.mark.parametrize("rule", BEYOND_SCHEMAS)
def test_rules_that_schemas_do_not_say(openapi_document: dict[str, Any], rule: str) -> None:
    reason, component, change = BEYOND_SCHEMAS[rule]
    body = BASES[component] | change
    assert validator_of(openapi_document, component).is_valid(body)
    faults = faults_in(component, body)
    assert faults
    assert all(re.match(reason, fault) for fault in faults), faults


@pytest.mark.parametrize(
    ("component", "field", "value", "good"),
    [
        ("NerTask", "text", "", False),
        ("NerTask", "text", " \n", False),
        ("NerTask", "text", "\n a", True),
        ("NerTask", "texts", ["a", " "], False),
        ("NerTask", "options", {"dictionary": {"A": [" a"]}}, False),
        ("NerTask", "options", {"dictionary": {"A": ["a b", "c"]}}, True),
        ("AceStepTask", "prompt", "    a", False),
        ("AceStepTask", "prompt", "  a b c ", True),
        ("EchoTask", "expires_at", "1969-12-31T23:59:59Z", False),
        ("EchoTask", "expires_at", "1970-01-01T00:00:00+14:00", True),
        ("EchoTask", "created_at", "9000-12-31T23:59:59Z", True),
        ("EchoTask", "created_at", "9001-01-01T00:00:00Z", False),
        ("EchoTask", "batch_line", 1, False),
        ("Batch", "source", "s3:x", False),
        ("Batch", "source", "s3:///in.jsonl", False),
        ("Batch", "source", "s3://Scans/in.jsonl", True),
        ("Batch", "window", {"start": "24:00", "end": "06:00"}, False),
        ("Batch", "window", {"start": "２２:００", "end": "06:00"}, False),
        ("Batch", "window", {"start": "22:00", "end": "06:00\n"}, False),
        ("Batch", "window", {"start": "22:00", "end": "06:00"}, True),
        ("Batch", "defaults", {"tenant": TENANT}, False),
        ("Batch", "defaults", {"priority": "low"}, True),
        ("Batch", "task_type", "nonsense", False),
        ("Batch", "task_type", "ocr", True),
        ("Batch", "batch_id", "night-20260101T000000Z", False),
        ("Batch", "batch_id", "night-20260101", True),
        ("Batch", "schedule", "night", False),
    ],
)
def test_edges_where_the_schema_and_the_gateway_agree(
    openapi_document: dict[str, Any], component: str, field: str, value: Any, good: bool
) -> None:
    body = BASES[component] | {field: value}
    if field == "texts":
        del body["text"]
    assert validator_of(openapi_document, component).is_valid(body) == good
    assert (faults_in(component, body) == []) == good
