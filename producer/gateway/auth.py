"""Who asks: the tenant of the API key in `Authorization: Bearer <key>` (RFC 6750)."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request, Security
from fastapi.security import HTTPBearer

from inferq.producer.gateway.problems import Refused
from inferq.producer.gateway.services import Here

# Only for the OpenAPI document: its own answer to a missing key would not be a problem document.
_scheme = HTTPBearer(auto_error=False, description="An API key: `Authorization: Bearer iq_...`")


async def tenant_of(
    request: Request, services: Here, _described: Annotated[object, Security(_scheme)]
) -> str:
    """The tenant whose key the request carries. Raises Refused (401)."""
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise Refused(
            401,
            "no_api_key",
            "the request carries no API key: send the header Authorization: Bearer <key>",
            headers={"WWW-Authenticate": 'Bearer realm="inferq"'},
        )
    tenant = services.keys.tenant_of(key.strip())
    if tenant is None:
        raise Refused(
            401,
            "unknown_api_key",
            "the API key is not known here",
            headers={"WWW-Authenticate": 'Bearer realm="inferq", error="invalid_token"'},
        )
    request.state.tenant = tenant
    return tenant


Tenant = Annotated[str, Depends(tenant_of)]
