"""How every room reads its settings: `INFERQ_*` variables, checked once, with errors a person can act on."""

from __future__ import annotations

from typing import Any, Self

from pydantic import ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from inferq.schemas.errors import InstallationError

_NETWORKS = (
    "give networks such as 10.0.0.0/8 or fd00::/8, separated by commas, with no bits set behind the prefix"
)
_EXPECTED = {"ip_v4_network": _NETWORKS, "ip_v6_network": _NETWORKS}
"""What is said in the place of pydantic's words, by the type of the fault."""


class Settings(BaseSettings):
    """The base of each room's settings. A subclass names its variables by its fields."""

    model_config = SettingsConfigDict(env_prefix="INFERQ_", extra="ignore", frozen=True, allow_inf_nan=False)

    @classmethod
    def load(cls, **given: Any) -> Self:
        """These settings from the environment, and from what is given, which goes first.

        Raises InstallationError, naming each bad variable.
        """
        try:
            return cls(**given)
        except ValidationError as error:
            prefix = str(cls.model_config.get("env_prefix", ""))
            # One value may have several faults, as one for each type that it could be of. Where in the value
            # they are is told in terms of the model, which nobody who sets a variable has seen.
            faults = dict.fromkeys(
                f"{prefix}{fault['loc'][0] if fault['loc'] else ''}".upper()
                + f": {_EXPECTED.get(fault['type'], fault['msg'])}"
                for fault in error.errors(include_url=False, include_input=False)
            )
            raise InstallationError("; ".join(faults), code="bad_settings") from error
