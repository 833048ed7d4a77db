"""JSON of models whose strings may hold what UTF-8 cannot."""

from __future__ import annotations

import json

from pydantic import BaseModel
from pydantic_core import PydanticSerializationError

from inferq.schemas.result import Result

_NO_OUTPUT = b'"output":null'

_NOT_FOR_EVERY_READER = (b"NaN", b"Infinity", b"\\ud", b"\\uD")
"""Signs of what JSON has no number for, and of escaped surrogates, which may be lone ones."""


def to_json(model: BaseModel) -> str:
    """The model's JSON, with lone surrogates replaced by `?`: no JSON reader would take them back."""
    try:
        return model.model_dump_json()
    except PydanticSerializationError:
        # As pydantic has it, what JSON has no number for is null.
        plain = json.loads(json.dumps(model.model_dump(mode="json")), parse_constant=lambda _: None)
        return clean(json.dumps(plain, ensure_ascii=False, allow_nan=False, separators=(",", ":")))


def result_json(result: Result, output: bytes | None = None) -> bytes:
    """The result's JSON, with `output`, which is JSON text, in the place of the output that it leaves out.

    The text goes in as it stands: to read and write a large output costs more than to store it.
    """
    if output is None:
        return to_json(result).encode()
    if result.output is not None:
        raise ValueError("the result has an output of its own")
    if any(sign in output for sign in _NOT_FOR_EVERY_READER):
        return to_json(result.model_copy(update={"output": json.loads(output)})).encode()
    # What stands before it are names and a state: none of them can hold a quote.
    before, _, after = to_json(result).encode().partition(_NO_OUTPUT)
    return b"".join((before, _NO_OUTPUT.removesuffix(b"null"), output, after))


def clean(text: str) -> str:
    """The text, with lone surrogates replaced by `?`."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()
