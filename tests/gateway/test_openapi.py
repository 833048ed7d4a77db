"""The OpenAPI document, checked by the rules of linters that matter."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from jsonschema import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator


def operations_of(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            yield path, method, operation


def parts_of(value: Any, where: str = "#") -> Iterator[tuple[str, Any]]:
    """Every object and list in `value`, with its place."""
    yield where, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, part in items:
        if isinstance(part, dict | list):
            yield from parts_of(part, f"{where}/{name}")


def test_the_document_is_openapi_3_1(openapi_document: dict[str, Any]) -> None:
    assert [error.message for error in OpenAPIV31SpecValidator(openapi_document).iter_errors()] == []


def test_the_document_says_who_serves_it_and_under_which_license(openapi_document: dict[str, Any]) -> None:
    assert openapi_document["servers"][0]["url"] == "http://127.0.0.1:8000"
    assert openapi_document["info"]["license"]["identifier"] == "Apache-2.0"
    assert openapi_document["info"]["contact"]["name"]
    assert openapi_document["info"]["description"]


def test_each_operation_is_described(openapi_document: dict[str, Any]) -> None:
    tags = {tag["name"] for tag in openapi_document["tags"] if tag["description"]}
    names = []
    for path, method, operation in operations_of(openapi_document):
        where = f"{method} {path}"
        names.append(operation["operationId"])
        assert re.fullmatch("[a-z]+(_[a-z]+)*", operation["operationId"]), where
        assert operation["summary"], where
        assert not operation["summary"].endswith("."), where
        assert operation["description"], where
        assert len(operation["tags"]) == 1, where
        assert set(operation["tags"]) <= tags, where
        assert "security" in operation, where
        assert any(code.startswith("2") for code in operation["responses"]), where
        for code, response in operation["responses"].items():
            if code[0] in "45" and "$ref" not in response:
                assert response["content"], f"{where} {code}: the answer has a form"
    assert len(names) == len(set(names)) > 20


def test_paths_and_their_parameters_fit(openapi_document: dict[str, Any]) -> None:
    for path, method, operation in operations_of(openapi_document):
        assert not path.endswith("/"), path
        assert "?" not in path
        parameters = [(parameter["in"], parameter["name"]) for parameter in operation.get("parameters", ())]
        assert len(parameters) == len(set(parameters)), (method, path)
        in_path = {name for place, name in parameters if place == "path"}
        assert in_path == set(re.findall(r"\{(\w+)\}", path)), (method, path)


def test_each_component_is_used(openapi_document: dict[str, Any]) -> None:
    used = {
        reference.removeprefix("#/components/")
        for _, part in parts_of(openapi_document)
        if isinstance(part, dict)
        for reference in [part.get("$ref")]
        if isinstance(reference, str)
    }
    components = openapi_document["components"]
    defined = {f"{kind}/{name}" for kind in ("schemas", "responses") for name in components[kind]}
    assert defined == used


def test_arrays_have_items_and_examples_and_defaults_fit_their_schemas(
    openapi_document: dict[str, Any],
) -> None:
    checked = 0
    for where, part in parts_of(openapi_document["components"]["schemas"]):
        if not isinstance(part, dict) or where.endswith(("/properties", "/default")):
            continue
        if part.get("type") == "array":
            assert "items" in part, where
        validator = Draft202012Validator(part | {"components": openapi_document["components"]})
        examples = part.get("examples", [])
        for value in [*examples, *([part["default"]] if "default" in part else [])]:
            assert validator.is_valid(value), (where, value)
            checked += 1
    assert checked > 20


def test_a_result_has_the_output_of_its_task_type(openapi_document: dict[str, Any]) -> None:
    schema = {"$ref": "#/components/schemas/Result", "components": openapi_document["components"]}
    validator = Draft202012Validator(schema)
    result = {
        "task_id": "a", "tenant": "t", "status": "succeeded", "attempts": 1, "finished_at": "2030-01-01T00:00:00Z"
    }  # fmt: skip
    for task_type, output, good in [
        ("ner", {"model": "m", "texts": []}, True),
        ("ner", {"payload": 1}, False),
        ("ner", None, True),
        ("echo", {"payload": 1}, True),
        ("echo", {"model": "m", "texts": []}, False),
        ("of-a-later-version", {"model": "m"}, True),
    ]:
        assert validator.is_valid(result | {"task_type": task_type, "output": output}) == good, task_type


def test_no_body_may_be_empty(openapi_document: dict[str, Any]) -> None:
    empty = {"application/json": {}, "multipart/form-data": {"file": ""}}
    for path in ("/v1/files", "/v1/batches", "/v1/tasks"):
        content = openapi_document["paths"][path]["post"]["requestBody"]["content"]
        for name, media in content.items():
            schema = media["schema"] | {"components": openapi_document["components"]}
            assert not Draft202012Validator(schema).is_valid(empty.get(name, "")), (path, name)
