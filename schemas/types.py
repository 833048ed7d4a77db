"""The installed task types, found by entry point, and the parser of their tasks."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, reduce
from importlib.metadata import EntryPoint, entry_points
from operator import or_
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from inferq.schemas.errors import InstallationError, InvalidTask
from inferq.schemas.settings import Settings
from inferq.schemas.task import INPUT_SCHEMES, MAX_BODY_BYTES, Task

ENTRY_POINT_GROUP = "inferq.engines"

MAX_DEPTH = 100
"""The deepest nesting of lists and objects in a task."""

# Two searches for one letter each are several times as fast as one search for both.
_HUGE_EXPONENT_E = re.compile(rb"E\+?[0-9]{3}")
_HUGE_EXPONENT = re.compile(rb"e\+?[0-9]{3}")

_log = logging.getLogger(__name__)


def never(_task: Task) -> bool:
    """For `TaskType.cacheable`: the task alone does not determine the output."""
    return False


def always(_task: Task) -> bool:
    """For `TaskType.cacheable`: the same inputs and options always give the same output."""
    return True


@dataclass(frozen=True)
class TaskType:
    """A kind of work: its task, its output, and its engine.

    `engine` is a `module:Class` path. Only an engine process imports it, so no other part loads a framework.
    `arguments` names the inputs that the command line takes by position. `time_limit` is in seconds.
    `cacheable` tells whether the result cache may answer a task; by default it may not. `settings` are the
    engine's settings, for the table of all settings.
    """

    name: str
    task: type[Task]
    output: type[BaseModel]
    engine: str
    arguments: tuple[str, ...] = ()
    time_limit: float = 300.0
    max_attempts: int = 5
    summary: str = ""
    cacheable: Callable[[Task], bool] = never
    settings: type[Settings] | None = None
    distribution: str = ""


@cache
def installed_types() -> Mapping[str, TaskType]:
    """Every installed task type by name, in alphabetical order.

    A plug-in that cannot be imported is logged and left out, so the others still work.
    """
    found: dict[str, TaskType] = {}
    for point in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda p: p.name):
        try:
            task_type = _load(point)
        except Exception as error:  # noqa: BLE001, RUF100 - a plug-in may raise anything on import
            _log.error("task type %r from %r is left out: %s", point.name, point.value, error)
            continue
        if point.name in found:
            _log.error(
                "task type %r is installed twice, by %r and %r: the first is used",
                point.name,
                found[point.name].distribution,
                task_type.distribution,
            )
            continue
        found[point.name] = task_type
    return MappingProxyType(found)


def _load(point: EntryPoint) -> TaskType:
    task_type = point.load()
    if not isinstance(task_type, TaskType):
        raise InstallationError(f"{point.value} is not an inferq.schemas.TaskType but {task_type!r}")
    if task_type.name != point.name:
        raise InstallationError(f"the entry point says {point.name!r}, the type itself {task_type.name!r}")
    return replace(task_type, distribution=point.dist.name if point.dist else "")


def get_type(name: str) -> TaskType:
    """The installed type of that name. Raises InvalidTask with the known names for any other."""
    types = installed_types()
    if name not in types:
        raise _unknown(name)
    return types[name]


def _unknown(name: str) -> InvalidTask:
    known = ", ".join(installed_types()) or "none"
    return InvalidTask(
        f"task_type {name[:80]!r} is not known here; known are: {known}", code="unknown_task_type"
    )


def parse_task(body: bytes | str | Mapping[str, Any], *, expected: str | None = None) -> Task:
    """The task in a message body (UTF-8 JSON) or in a decoded mapping, validated by its task type.

    A task of the type `expected` is parsed faster. Raises InvalidTask, which names each faulty field.
    """
    if isinstance(body, Mapping):
        try:
            body = json.dumps(body, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InvalidTask(f"the task is not JSON: {error}", code="not_json") from error
    if isinstance(body, str):
        body = body.encode("utf-8", "surrogatepass")
    if len(body) > MAX_BODY_BYTES:
        raise InvalidTask(
            f"the task has {len(body)} bytes, the limit is {MAX_BODY_BYTES}; pass large inputs by URL",
            code="task_too_large",
        )
    if b"NaN" in body or b"Infinity" in body or _HUGE_EXPONENT.search(body) or _HUGE_EXPONENT_E.search(body):
        _refuse_constants(body)
    if body.count(b"[") + body.count(b"{") > MAX_DEPTH:
        _refuse_depth(body)
    try:
        task: Task = _reader(expected)(body)
    except ValidationError as error:
        if expected is None:
            raise _explain(error) from error
        return parse_task(body)  # another type, or invalid: the union of all types tells
    return task


def _refuse_constants(body: bytes) -> None:
    # pydantic accepts these in free-form values, but RFC 8259 has no such literals.
    def refuse(name: str) -> None:
        raise InvalidTask(f"the task is not JSON: {name} is not a JSON number", code="not_json")

    def finite(text: str) -> float:
        number = float(text)
        if math.isinf(number):
            raise InvalidTask(f"the task holds {text}, which no double can hold", code="not_json")
        return number

    try:
        json.loads(body, parse_constant=refuse, parse_float=finite)
    except (ValueError, RecursionError):
        return  # pydantic reports the fault


def _refuse_depth(body: bytes) -> None:
    # A result holds the content of its task some levels deeper, and must stay readable.
    try:
        level = [json.loads(body)]
    except (ValueError, RecursionError):
        return
    depth = 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise InvalidTask(f"the task is nested more than {MAX_DEPTH} levels deep", code="nested_too_deep")
        level = [
            child
            for value in level
            if isinstance(value, dict | list)
            for child in (value.values() if isinstance(value, dict) else value)
            if isinstance(child, dict | list)
        ]


@cache
def _reader(type_name: str | None) -> Callable[[bytes], Any]:
    known = installed_types().get(type_name) if type_name is not None else None
    return known.task.__pydantic_validator__.validate_json if known else _union().validate_json


@cache
def _union() -> TypeAdapter[Any]:
    types = installed_types()
    if not types:
        raise InstallationError(f"no task type is installed (entry-point group {ENTRY_POINT_GROUP!r})")
    models = [task_type.task for task_type in types.values()]
    if len(models) == 1:
        return TypeAdapter(models[0])
    return TypeAdapter(Annotated[reduce(or_, models), Field(discriminator="task_type")])  # type: ignore[arg-type]


def _explain(error: ValidationError) -> InvalidTask:
    faults = error.errors(include_url=False, include_context=True)
    first = faults[0]
    if first["type"] == "union_tag_invalid" or (
        first["type"] == "literal_error" and first["loc"][-1] == "task_type"
    ):
        return _unknown(str(first["ctx"].get("tag", first["input"])))
    if first["type"] == "json_invalid":
        return InvalidTask(f"the task is not JSON: {first['ctx']['error']}", code="not_json")
    return InvalidTask("; ".join(describe_faults(error)))


_UNION_PART = re.compile(
    r"(constrained-)?(int|float|str|bool|bytes|datetime|date|none|any)$|(literal|function-\w+|list|dict|tuple|set|"
    r"nullable|union|tagged-union|json-or-python|lax-or-strict)\[.*\]$"
)
"""How pydantic names the parts of a union."""


def describe_faults(error: ValidationError) -> list[str]:
    """One line for each fault of a validation: the path of the field, and the fault."""
    faults = error.errors(include_url=False)
    # A value that fits no part of a union has a fault for each part.
    parts: dict[str, list[ErrorDetails]] = {}
    for fault in faults:
        parts.setdefault(_where(fault), []).append(fault)
    return [
        describe_fault(group[0]) if len(group) == 1 else _describe_union(where, group)
        for where, group in parts.items()
    ]


def _describe_union(where: str, faults: list[ErrorDetails]) -> str:
    said = dict.fromkeys(_said(where, fault) for fault in faults)
    return f"{where}: {', or '.join(said)}, got {_shown(faults[0]['input'], faults[0]['type'])}"


def describe_fault(fault: ErrorDetails) -> str:
    """One fault of a validation as a line, as in `describe_faults`."""
    where = _where(fault)
    match fault["type"]:
        case "missing":
            what = "is missing"
        case "union_tag_not_found":
            where, what = "task_type", "is missing"
        case "extra_forbidden":
            what = "is unknown"
        case kind:
            what = f"{_said(where, fault)}, got {_shown(fault['input'], kind)}"
    return f"{where}: {what}"


def _where(fault: ErrorDetails) -> str:
    """The field of a fault. Pydantic also names the part of a union that it tried, such as `constrained-int`."""
    path = [_name(part) for part in fault["loc"] if not _UNION_PART.match(str(part))]
    if path and path[0] in installed_types():
        path = path[1:]  # the tag of the union, which is the task type
    return ".".join(path) or "task"


def _said(where: str, fault: ErrorDetails) -> str:
    kind, said = fault["type"], fault["msg"].removeprefix("Value error, ")
    if kind == "string_pattern_mismatch":
        said = _form(where) or said
    elif kind in {"datetime_type", "datetime_parsing", "datetime_from_date_parsing"}:
        said = "must be a time with a zone, such as 2030-01-31T12:00:00Z"
    return f"{said[:1].lower()}{said[1:]}"


def _name(part: int | str) -> str:
    """The name of a field, which may be any text of the sender: short, and without control characters."""
    text = str(part)
    return text if re.fullmatch(r"[\w.-]{1,80}", text) else json.dumps(text[:80])


def _shown(value: object, kind: str) -> str:
    """A wrong value as a fault may show it: faults reach logs, which no text, URL or secret of a sender may reach.

    Numbers are shown. So is a text that looks like a name, in a field that takes only certain names.
    """
    match value:
        case None | bool() | int() | float():
            return json.dumps(value)
        case str() if kind in {"literal_error", "enum"} and re.fullmatch(r"[\w.-]{1,40}", value):
            return json.dumps(value, ensure_ascii=False)
        case str():
            return f"a text of {len(value)} characters"
        case list() | tuple():
            return f"a list of {len(value)}"
    return "an object" if isinstance(value, dict) else f"a {type(value).__name__}"


def _form(field: str) -> str | None:
    """The expected form of a field whose pattern is hard to read."""
    match field:
        case "callback_url":
            return "must be an http:// or https:// URL"
        case "task_id" | "batch_id":
            most = 128 if field == "task_id" else 116
            return f"must be 1 to {most} of A-Z a-z 0-9 . _ : -"
        case "tenant":
            return "must be 1 to 64 of A-Z a-z 0-9 . _ -"
        case "task_type":
            return "must be the name of a task type, such as ocr"
        case _ if field.endswith("_url"):
            return f"must be a URL that begins with {':, '.join(INPUT_SCHEMES[:-1])}: or {INPUT_SCHEMES[-1]}:"
    return None
