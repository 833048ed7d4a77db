"""JSON of models whose strings may hold what UTF-8 cannot."""

from __future__ import annotations

import json

from pydantic import BaseModel
from pydantic_core import PydanticSerializationError


def to_json(model: BaseModel) -> str:
    """The model's JSON, with lone surrogates replaced by `?`: no JSON reader would take them back."""
    try:
        return model.model_dump_json()
    except PydanticSerializationError:
        return clean(json.dumps(model.model_dump(mode="json"), ensure_ascii=False, allow_nan=False))


def clean(text: str) -> str:
    """The text, with lone surrogates replaced by `?`."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()
