"""The tenant of a request: that of the API key in `Authorization: Bearer <key>` (RFC 6750)."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request, Security
from fastapi.security import HTTPBearer
from structlog.contextvars import bind_contextvars

from inferq.producer.gateway.problems import ProblemError
from inferq.producer.gateway.services import ServicesDep

# For the OpenAPI document only: its own answer to a missing key is not a problem document.
_scheme = HTTPBearer(auto_error=False, description="An API key: `Authorization: Bearer iq_...`")


async def tenant_of(
    request: Request, services: ServicesDep, _documented: Annotated[object, Security(_scheme)]
) -> str:
    """The tenant whose key the request carries. Raises ProblemError (401)."""
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise ProblemError(
            401,
            "no_api_key",
            "the request has no API key; send the header Authorization: Bearer <key>",
            headers={"WWW-Authenticate": 'Bearer realm="inferq"'},
        )
    record = services.keys.find(key.strip())
    if record is None:
        raise ProblemError(
            401,
            "unknown_api_key",
            "the API key is unknown or was removed; ask the operator for a new one",
            headers={"WWW-Authenticate": 'Bearer realm="inferq", error="invalid_token"'},
        )
    request.state.key_id = record.key_id
    request.state.tenant = record.tenant  # for the span
    bind_contextvars(tenant=record.tenant)
    return record.tenant


CurrentTenant = Annotated[str, Depends(tenant_of)]
