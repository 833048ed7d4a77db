"""The base of all settings: `INFERQ_*` variables, checked once, with errors that name the variable."""

from __future__ import annotations

from typing import Any, Self

from pydantic import ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from inferq.schemas.errors import InstallationError

_NETWORKS = (
    "give networks such as 10.0.0.0/8 or fd00::/8, separated by commas, with no bits set behind the prefix"
)
_EXPECTED = {"ip_v4_network": _NETWORKS, "ip_v6_network": _NETWORKS}
"""Texts that replace those of pydantic, by the type of the fault."""


class Settings(BaseSettings):
    """The base of each room's settings. A subclass names its variables by its fields."""

    model_config = SettingsConfigDict(env_prefix="INFERQ_", extra="ignore", frozen=True, allow_inf_nan=False)

    @classmethod
    def load(cls, **given: Any) -> Self:
        """These settings from the environment; `given` values override it.

        Raises InstallationError, which names each bad variable.
        """
        try:
            return cls(**given)
        except ValidationError as error:
            prefix = str(cls.model_config.get("env_prefix", ""))
            # A value may have several faults, one for each type that it could have. Their places within the
            # value are named in terms of the model, which means nothing to the person who sets a variable.
            faults = dict.fromkeys(
                f"{prefix}{fault['loc'][0] if fault['loc'] else ''}".upper()
                + f": {_EXPECTED.get(fault['type'], fault['msg'])}"
                for fault in error.errors(include_url=False, include_input=False)
            )
            raise InstallationError("; ".join(faults), code="bad_settings") from error
