"""JSON of models whose strings may hold lone surrogates, which UTF-8 cannot encode."""

from __future__ import annotations

import json

from pydantic import BaseModel
from pydantic_core import PydanticSerializationError

from inferq.schemas.result import Result

_NO_OUTPUT = b'"output":null'

_NOT_FOR_EVERY_READER = (b"NaN", b"Infinity", b"\\ud", b"\\uD")
"""Signs of numbers that JSON does not have, and of escaped surrogates, which may be lone."""


def to_json(model: BaseModel) -> str:
    """The JSON of the model. Lone surrogates become `?`, because JSON readers refuse them."""
    try:
        return model.model_dump_json()
    except PydanticSerializationError:
        # As in pydantic, a number that JSON does not have becomes null.
        plain = json.loads(json.dumps(model.model_dump(mode="json")), parse_constant=lambda _: None)
        return clean(json.dumps(plain, ensure_ascii=False, allow_nan=False, separators=(",", ":")))


def result_json(result: Result, output: bytes | None = None) -> bytes:
    """The JSON of the result. `output` is the output as JSON text, for a result without its output.

    The text is inserted unparsed: parsing and writing a large output costs more than storing it.
    """
    if output is None:
        return to_json(result).encode()
    if result.output is not None:
        raise ValueError("the result has an output of its own")
    if any(sign in output for sign in _NOT_FOR_EVERY_READER):
        return to_json(result.model_copy(update={"output": json.loads(output)})).encode()
    # Only names and a state come before the output, and none of them holds a quote.
    before, _, after = to_json(result).encode().partition(_NO_OUTPUT)
    return b"".join((before, _NO_OUTPUT.removesuffix(b"null"), output, after))


def clean(text: str) -> str:
    """The text, with lone surrogates replaced by `?`."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()
