from __future__ import annotations

from tests.gateway.conftest import (
    gateway,
    lone_gateway,
    own_gateway,
    publisher,
    shared_gateway,
    shared_lone_gateway,
    shared_publisher,
)

__all__ = [
    "gateway",
    "lone_gateway",
    "own_gateway",
    "publisher",
    "shared_gateway",
    "shared_lone_gateway",
    "shared_publisher",
]
