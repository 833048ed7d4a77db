"""Routers whose GET routes answer HEAD too, and the methods of a path."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from fastapi import APIRouter
from fastapi.routing import APIRoute
from sse_starlette import EventSourceResponse
from starlette.routing import BaseRoute, Match
from starlette.types import Scope


class Router(APIRouter):
    """A router that answers HEAD wherever it answers GET (RFC 9110, 9.3.2), except for event streams.

    FastAPI, unlike Starlette, adds no HEAD itself. The server leaves out the body. A route whose body is costly
    leaves it out itself.
    """

    def add_api_route(self, path: str, endpoint: Callable[..., Any], **arguments: Any) -> None:
        super().add_api_route(path, endpoint, **arguments)
        if "GET" in arguments["methods"] and arguments["response_class"] is not EventSourceResponse:
            super().add_api_route(
                path, endpoint, **arguments | {"methods": ["HEAD"], "include_in_schema": False}
            )


def methods_of_path(routes: Iterable[BaseRoute], scope: Scope) -> set[str]:
    """The methods that the path of a request supports."""
    return {
        method
        for route in routes
        if isinstance(route, APIRoute) and route.matches(scope)[0] is not Match.NONE
        for method in route.methods or ()
    }
