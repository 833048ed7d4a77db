"""How every room reads its settings: `INFERQ_*` variables, checked once, with errors a person can act on."""

from __future__ import annotations

from typing import Any, Self

from pydantic import ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from schemas.errors import InstallationError


class Settings(BaseSettings):
    """The base of each room's settings. A subclass names its variables by its fields."""

    model_config = SettingsConfigDict(env_prefix="INFERQ_", extra="ignore", frozen=True)

    @classmethod
    def load(cls, **given: Any) -> Self:
        """These settings from the environment, and from what is given, which goes first.

        Raises InstallationError, naming each bad variable.
        """
        try:
            return cls(**given)
        except ValidationError as error:
            prefix = str(cls.model_config.get("env_prefix", ""))
            faults = [
                f"{prefix}{'_'.join(str(part) for part in fault['loc'])}".upper() + f": {fault['msg']}"
                for fault in error.errors(include_url=False, include_input=False)
            ]
            raise InstallationError("; ".join(faults), code="bad_settings") from error
