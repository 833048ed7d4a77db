"""The settings of callback delivery."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator
from pydantic_settings import NoDecode

from inferq.schemas import Settings
from inferq.storage.settings import Network

SCHEDULE = (0.0, 5.0, 300.0, 1800.0, 7200.0, 18000.0, 36000.0, 36000.0)
"""Seconds before each attempt, as Standard Webhooks proposes; the first is immediate."""


class CallbackSettings(Settings):
    """The settings of callback delivery."""

    callback_schedule: Annotated[tuple[float, ...], NoDecode] = Field(
        SCHEDULE,
        min_length=1,
        max_length=50,
        description="Seconds before each attempt to deliver a callback, counted from the attempt before. The "
        "first value must be 0: the first attempt is immediate.",
    )
    callback_timeout: float = Field(
        15.0, gt=0, le=300, description="Seconds that one attempt to deliver a callback may take in all."
    )
    callback_allowed_networks: Annotated[tuple[Network, ...], NoDecode] = Field(
        (),
        description="Private networks that callbacks may go to: CIDRs, separated by commas.",
    )
    callback_loopback_tenants: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Tenants whose callbacks may go to loopback addresses of the machine that delivers them, separated "
        "by commas. `inferq up` sets it to `default`, its owner's tenant.",
    )
    callback_target_limit: int = Field(
        8,
        ge=1,
        le=1000,
        description="The most callbacks in flight to one target (scheme, host and port) from each process of "
        "`inferq callbacks`.",
    )

    @field_validator("callback_schedule", mode="before")
    @classmethod
    def _numbers(cls, value: Any) -> Any:
        return _split(value)

    @field_validator("callback_schedule", mode="after")
    @classmethod
    def _not_negative(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0 <= seconds <= 10 * 86400 for seconds in value):
            raise ValueError("each value must be between 0 and 864000 seconds (10 days)")
        if value[0] != 0:
            raise ValueError("the first value must be 0, as in 0,5,300")
        return value

    @field_validator("callback_allowed_networks", "callback_loopback_tenants", mode="before")
    @classmethod
    def _parts(cls, value: Any) -> Any:
        return _split(value)


def _split(value: Any) -> Any:
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value
