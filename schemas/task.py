"""The task: what a producer asks for, and the only body that travels on the work queues."""

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
    JsonValue,
    StringConstraints,
    field_validator,
)

from inferq.schemas.errors import InvalidTask
from inferq.schemas.http_url import parse_http_url

MAX_BODY_BYTES = 64 * 1024
"""The largest task body; anything larger goes by reference (an input URL)."""

Priority = Literal["high", "normal", "low"]
PRIORITIES: tuple[Priority, ...] = get_args(Priority)
"""All priorities, the most urgent first."""

CallbackEvent = Literal["started", "progress", "completed"]

TaskId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._:-]{1,128}$")]
TypeName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_-]{0,62}$")]
Tenant = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,64}$")]

_NOT_ASKED = {"created_at"}
"""Fields that say nothing of what a task asks for."""

_canonical = json.JSONEncoder(sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode

INPUT_SCHEMES = ("https", "http", "s3", "data", "inferq")


class _InputMark:
    """Tells an input's URL from other texts."""


InputUrl = Annotated[
    str,
    _InputMark(),
    StringConstraints(pattern=rf"^({'|'.join(INPUT_SCHEMES)}):.+"),
    Field(
        description="Where the input is: `https:`, `http:`, `s3:`, `data:`, or `inferq:` (an uploaded file).",
        json_schema_extra={"format": "uri"},
    ),
]


def _check_callback_url(url: str) -> str:
    try:
        parse_http_url(url)
    except InvalidTask as error:
        raise ValueError(error.message) from error
    return url


HttpText = Annotated[str, StringConstraints(pattern=r"^https?://[^\s/]+\S*$", max_length=2048)]
CallbackUrl = Annotated[HttpText, AfterValidator(_check_callback_url)]


class Options(BaseModel):
    """Engine options of one task type; a type's own options derive from this. Unknown ones are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def __eq__(self, other: object) -> bool:
        # Each body asks whether the options are the default ones, and mostly they are that very object.
        return self is other or super().__eq__(other)

    def __hash__(self) -> int:
        return hash((type(self), *self.__dict__.values()))


class Task(BaseModel):
    """What every task says, whatever its type. A type's own task adds its inputs, flat, and its options."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    task_id: TaskId = Field(description="The same id, for one tenant, is the same task.")
    task_type: TypeName
    options: Options = Options()
    priority: Priority = "normal"
    tenant: Tenant = "default"
    callback_url: CallbackUrl | None = Field(None, description="Where to notify.")
    callback_events: tuple[CallbackEvent, ...] = Field(("completed",), description="Of what to notify.")
    expires_at: AwareDatetime | None = Field(None, description="When it stops being worth starting.")
    time_limit: float | None = Field(
        None, gt=0, le=86400, description="Seconds that one run may take; the default is the type's."
    )
    batch_id: TaskId | None = None
    batch_line: int | None = Field(
        None,
        ge=1,
        le=1 << 31,
        description="Its line in the batch's source, from 1; set by whoever feeds the batch.",
    )
    # A dict as the default itself would be copied for each task, which costs as much as reading the task.
    metadata: dict[str, JsonValue] = Field(
        default_factory=dict,
        description="Echoed in the result and in callbacks.",
        json_schema_extra={"default": {}},
    )
    created_at: AwareDatetime | None = None

    @field_validator("expires_at", "created_at", mode="after")
    @classmethod
    def _within_the_calendar(cls, value: datetime | None) -> datetime | None:
        # A time near year 1 or 9999 with an offset cannot be moved to UTC without overflowing.
        if value is not None and not 1970 <= value.year <= 9000:
            raise ValueError("the year must lie between 1970 and 9000")
        return value

    def body(self) -> bytes:
        """The UTF-8 JSON that goes onto the queue: the fields that were given, and no default.

        A given value stays in it even where it is the default, which a later version may change.
        """
        # As model_dump_json does, without the way over a str.
        return self.__pydantic_serializer__.to_json(self, exclude_unset=True)

    def digest(self) -> str:
        """SHA-256 (hex) of what the task asks for, so that the same id with another content shows.

        Defaults and `created_at` do not count: the bare message and one that spells the defaults out are
        the same task, and so is one that a gateway has stamped.

        It is made once, where the task is accepted, and travels with the message: in another version, with
        other defaults, it may come out differently.
        """
        # As model_dump does, without the way over its own arguments.
        content = self.__pydantic_serializer__.to_python(
            self, mode="json", exclude_defaults=True, exclude=_NOT_ASKED
        )
        return hashlib.sha256(_canonical(content).encode("utf-8", "surrogatepass")).hexdigest()

    def inputs(self) -> Mapping[str, str]:
        """The inputs to be fetched before a run: field name → URL, in the order of the fields."""
        return {name: url for name in input_fields(type(self)) if (url := getattr(self, name)) is not None}


@cache
def input_fields(model: type[Task]) -> tuple[str, ...]:
    """The fields of a task type that name an input to be fetched: those annotated with InputUrl."""
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
    """A fresh task id that sorts by the time it was made (UUID version 7, RFC 9562)."""
    return str(uuid_utils.uuid7())
