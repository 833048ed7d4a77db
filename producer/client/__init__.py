"""The Python client of the HTTP gateway.

client     Client and AsyncClient
requests   what to send, when to send it again, and what the answers mean; no network
transfers  files to upload and to download
"""

from inferq.producer.client.client import AsyncClient, Client
from inferq.producer.client.requests import (
    ApiError,
    Conflict,
    InvalidRequest,
    NotEnded,
    NotFound,
    Unauthorized,
    Unavailable,
)

__all__ = [
    "ApiError",
    "AsyncClient",
    "Client",
    "Conflict",
    "InvalidRequest",
    "NotEnded",
    "NotFound",
    "Unauthorized",
    "Unavailable",
]
