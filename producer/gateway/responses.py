"""JSON answers."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlencode

from fastapi.responses import Response
from pydantic import BaseModel


def json_response(model: BaseModel, code: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """The model as JSON."""
    return Response(model.model_dump_json(), code, headers, "application/json")


def page_response(page: BaseModel, next_path: str | None) -> Response:
    """A page of a list as JSON, with a `Link` header (RFC 8288) to the next one."""
    return json_response(page, headers={"Link": f'<{next_path}>; rel="next"'} if next_path else None)


def page_path(path: str, query: Mapping[str, str | int | None]) -> str | None:
    """The path of a list's next page; None on the last one, whose query has no `cursor`."""
    if query.get("cursor") is None:
        return None
    return f"{path}?{urlencode({name: value for name, value in query.items() if value is not None})}"
