"""The task: the request of a producer, and the only body on the work queues."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Annotated, Any, Literal, get_args, get_origin

import uuid_utils
from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    JsonValue,
    StringConstraints,
)
from pydantic_core import PydanticCustomError, core_schema

from inferq.schemas.errors import InvalidTask
from inferq.schemas.http_url import parse_http_url

MAX_BODY_BYTES = 64 * 1024
"""The largest task body. Larger data goes by reference, as an input URL."""

Priority = Literal["high", "normal", "low"]
PRIORITIES: tuple[Priority, ...] = get_args(Priority)
"""All priorities, most urgent first."""

CallbackEvent = Literal["started", "progress", "completed"]

TaskId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._:-]{1,128}$")]
TypeName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]{0,62}$")]
Tenant = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,64}$")]

_NOT_ASKED = {"created_at"}
"""Fields that are no part of the digest."""

_canonical = json.JSONEncoder(sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode

INPUT_SCHEMES = ("https", "http", "s3", "data", "inferq")


class _InputMark:
    """Marks a field as the URL of an input."""


InputUrl = Annotated[
    str,
    _InputMark(),
    StringConstraints(pattern=rf"^({'|'.join(INPUT_SCHEMES)}):.+"),
    Field(
        description="The URL of the input: `https:`, `http:`, `s3:`, `data:`, or `inferq:` (an uploaded file).",
        json_schema_extra={"format": "uri"},
    ),
]


def _within_the_calendar(value: datetime) -> datetime:
    # A time with an offset near year 1 or 9999 overflows when it is converted to UTC.
    if not 1970 <= value.year <= 9000:
        raise ValueError("the year must lie between 1970 and 9000")
    return value


def _check_callback_url(url: str) -> str:
    try:
        parse_http_url(url)
    except InvalidTask as error:
        raise ValueError(error.message) from error
    return url


_YEARS = {"pattern": "^(19[7-9][0-9]|[2-8][0-9]{3}|9000)-"}
"""The years 1970 to 9000, as JSON Schema."""

Moment = Annotated[AwareDatetime, AfterValidator(_within_the_calendar), Field(json_schema_extra=_YEARS)]

HttpText = Annotated[str, StringConstraints(pattern=r"^https?://[^\s/]+\S*$", max_length=2048)]
CallbackUrl = Annotated[HttpText, AfterValidator(_check_callback_url)]


def _no_boolean(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("number_type", "input should be a number")
    return value


def _refusing_booleans(schema: Any) -> Any:
    """A schema of pydantic's whose numbers refuse booleans. Python takes true for 1."""
    if isinstance(schema, list | tuple):
        return type(schema)(_refusing_booleans(part) for part in schema)
    if not isinstance(schema, dict):
        return schema
    changed = {key: part if key in _NO_SCHEMAS else _refusing_booleans(part) for key, part in schema.items()}
    if changed.get("type") in {"int", "float"}:
        return core_schema.no_info_before_validator_function(_no_boolean, changed)
    return changed


_NO_SCHEMAS = {"default", "expected", "metadata", "serialization", "config", "ref", "schema_ref"}
"""Members of a schema that hold no schema to change."""


class _Checked(BaseModel):
    """A model whose numbers refuse booleans: `"seed": true` is a mistake, not the seed 1."""

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: type[BaseModel], handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        schema: core_schema.CoreSchema = _refusing_booleans(handler(source))
        return schema


class Options(_Checked):
    """The options of an engine. A task type derives its own from this. Unknown options are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def __eq__(self, other: object) -> bool:
        # Each digest compares the options with the default ones; mostly they are the same object.
        return self is other or super().__eq__(other)

    def __hash__(self) -> int:
        return hash((type(self), *self.__dict__.values()))


class Task(_Checked):
    """The fields of every task. A task type derives its own from this, with its inputs and options."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    task_id: TaskId = Field(description="One task for each id of a tenant.")
    task_type: TypeName
    options: Options = Options()
    priority: Priority = "normal"
    tenant: Tenant = "default"
    callback_url: CallbackUrl | None = Field(None, description="The URL to notify.")
    callback_events: tuple[CallbackEvent, ...] = Field(("completed",), description="The events to notify of.")
    expires_at: Moment | None = Field(None, description="Not started after this time.")
    time_limit: float | None = Field(
        None, gt=0, le=86400, description="Seconds that one run may take. The task type has a default."
    )
    batch_id: TaskId | None = None
    batch_line: int | None = Field(
        None,
        ge=1,
        le=1 << 31,
        description="The line in the batch's source, from 1. Set by inferq, not by the producer.",
    )
    # pydantic copies a default dict for each task, which costs as much as parsing the task.
    metadata: dict[str, JsonValue] = Field(
        default_factory=dict,
        description="Repeated in the result and in callbacks.",
        json_schema_extra={"default": {}},
    )
    created_at: Moment | None = None

    def body(self) -> bytes:
        """The UTF-8 JSON for the queue: the fields that were given, without defaults.

        A given value stays in the body even if it equals the default: a later version may change the default.
        """
        # model_dump_json would make a str first.
        return self.__pydantic_serializer__.to_json(self, exclude_unset=True)

    def digest(self) -> str:
        """SHA-256 (hex) of the task's content. It detects another task under the same id.

        Defaults and `created_at` do not count. A task that spells the defaults out is the same task.

        The part that accepts a task makes its digest once, and the digest travels with the message. A later
        version with other defaults may compute another one.
        """
        # model_dump would first check its own arguments.
        content = self.__pydantic_serializer__.to_python(
            self, mode="json", exclude_defaults=True, exclude=_NOT_ASKED
        )
        return hashlib.sha256(_canonical(content).encode("utf-8", "surrogatepass")).hexdigest()

    def inputs(self) -> Mapping[str, str]:
        """The inputs to fetch before a run: field name → URL, in the order of the fields."""
        return {name: url for name in input_fields(type(self)) if (url := getattr(self, name)) is not None}


@cache
def input_fields(model: type[Task]) -> tuple[str, ...]:
    """The input fields of a task type: those annotated with InputUrl."""
    return tuple(
        name for name, field in model.model_fields.items() if _is_input(field.annotation, field.metadata)
    )


def _is_input(annotation: Any, metadata: Sequence[Any]) -> bool:
    return any(isinstance(item, _InputMark) for item in metadata) or any(
        _is_input(get_args(part)[0], part.__metadata__)
        if get_origin(part) is Annotated
        else _is_input(part, ())
        for part in get_args(annotation)
    )


def new_task_id() -> str:
    """A new task id. Ids sort by time (UUID version 7, RFC 9562)."""
    return str(uuid_utils.uuid7())
