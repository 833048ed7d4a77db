"""Turns the arguments of the command line into the fields of a task."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Union, get_args, get_origin

from pydantic import BaseModel, JsonValue
from pydantic.fields import FieldInfo

from inferq.producer.client.sync_client import Client
from inferq.schemas import INPUT_SCHEMES, InvalidTask, TaskType, input_fields

_FILE_NAME = re.compile(r"\S{0,250}(?:\.[A-Za-z][A-Za-z0-9]{0,4}|/)")
"""A word that ends like a file's name or a folder's."""


@dataclass(frozen=True)
class Given:
    """One input of the command line: a URL or a text, or the name of a `file` to upload."""

    text: str
    file: Path | None = None
    as_json: bool = False

    def value(self, client: Client) -> JsonValue:
        if self.file is not None:
            return client.upload(self.file)
        _check_text(self.text)
        return _read(self.text) if self.as_json else self.text


def parse_assignments(task_type: TaskType, assignments: Sequence[str]) -> dict[str, JsonValue]:
    """The fields of a task from `K=V` pairs. A name that only the type's options have sets an option.

    Raises InvalidTask if a pair has no `=`, or if neither the task nor its options have the name.
    """
    fields: dict[str, JsonValue] = {}
    options: dict[str, JsonValue] = {}
    known = task_type.task.model_fields
    known_options = _options_of(task_type)
    for assignment in assignments:
        _check_text(assignment)
        name, sign, text = assignment.partition("=")
        if not sign or not name:
            raise InvalidTask(f"--set {assignment!r} is not of the form name=value")
        plain = name.removeprefix("options.")
        if name in known and name != "options":
            fields[name] = text if _is_text(known[name].annotation) else _read(text)
        elif plain in known_options:
            options[plain] = text if _is_text(known_options[plain].annotation) else _read(text)
        else:
            names = [*(n for n in known if n != "options"), *known_options]
            raise InvalidTask(
                f"--set {name}: {task_type.name} has no such field or option; it has {', '.join(names)}"
            )
    return fields | ({"options": options} if options else {})


def _check_text(text: str) -> None:
    """Raise InvalidTask for an argument that is not UTF-8. Python replaces its bytes with lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidTask(
            f"the argument {text[:80]!r} is not UTF-8: give it in UTF-8, or as a file"
        ) from error


def _options_of(task_type: TaskType) -> Mapping[str, FieldInfo]:
    options = task_type.task.model_fields["options"].annotation
    return options.model_fields if isinstance(options, type) and issubclass(options, BaseModel) else {}


def _read(text: str) -> JsonValue:
    try:
        value: JsonValue = json.loads(text)
        json.dumps(value, allow_nan=False)  # Python accepts NaN and 1e999; JSON cannot hold them
    except ValueError:
        return text
    return value


def bundle(
    task_type: TaskType, inputs: Sequence[str], *, given: Mapping[str, JsonValue]
) -> list[dict[str, Given]]:
    """Group the positional inputs by task: one mapping of field name to input for each task.

    A type with two positional inputs takes them in pairs. A field in `given` takes no positional input.
    Raises InvalidTask if the number of inputs does not fit, or if an input is not found.
    """
    names = [name for name in task_type.arguments if name not in given and f"{name}_url" not in given]
    if not inputs:
        return [{}]
    if not names:
        raise InvalidTask(f"{task_type.name} takes no further inputs; got {inputs[0]!r}")
    if len(inputs) % len(names):
        raise InvalidTask(
            f"{task_type.name} takes {len(names)} inputs a task ({', '.join(names)}); got {len(inputs)}"
        )
    return [
        dict(_place(task_type, name, text) for name, text in zip(names, inputs[start:], strict=False))
        for start in range(0, len(inputs), len(names))
    ]


def _place(task_type: TaskType, name: str, text: str) -> tuple[str, Given]:
    """The field of an input: `name`, or `{name}_url` if that takes files and the input is a file or URL."""
    fields = task_type.task.model_fields
    is_url = text.partition(":")[0].lower() in INPUT_SCHEMES
    files = input_fields(task_type.task)
    file = Path(text)
    for candidate in (name, f"{name}_url"):
        if candidate not in files:
            continue
        if is_url:
            return candidate, Given(text)
        if _is_file(file):
            return candidate, Given(text, file)
    if name in files:
        raise InvalidTask(
            f"{text!r} is neither a file here nor a URL ({', '.join(f'{s}:' for s in INPUT_SCHEMES)})",
            code="input_not_found",
        )
    if f"{name}_url" in files and _FILE_NAME.fullmatch(text):
        raise InvalidTask(
            f"{text!r} looks like a file's name, and there is no such file here; to send it as the text itself, "
            f"write --set {name}={text}",
            code="input_not_found",
        )
    return name, Given(text, as_json=not _is_text(fields[name].annotation))


def _is_text(annotation: object) -> bool:
    """Whether a field takes only text, so that `2024` and `true` are not read as JSON."""
    if get_origin(annotation) is Annotated:
        return _is_text(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return all(part is NoneType or _is_text(part) for part in get_args(annotation))
    return annotation is str


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # the text is not a possible file name
        return False
