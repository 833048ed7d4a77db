"""The base of all settings: `INFERQ_*` variables, checked once, with errors that name the variable."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from pydantic import ValidationError, model_validator
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

    @model_validator(mode="before")
    @classmethod
    def _stripped(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Strip white space, such as the newline at the end of a secret's file, and drop what is empty.

        `INFERQ_X=` in a compose file means "not set". An empty URL that has a default stays and is refused: taking
        the default would connect a part to another server than the one that somebody meant to name.
        """
        stripped = {key: value.strip() if isinstance(value, str) else value for key, value in values.items()}
        return {key: value for key, value in stripped.items() if value != "" or cls._needs_a_value(key)}

    @classmethod
    def _needs_a_value(cls, key: str) -> bool:
        field = cls.model_fields.get(key)
        return field is not None and key.endswith("_url") and field.get_default() is not None

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
                f"{prefix}{str(fault['loc'][0]).removeprefix(prefix) if fault['loc'] else ''}".upper()
                + f": {_EXPECTED.get(fault['type'], fault['msg'])}"
                for fault in error.errors(include_url=False, include_input=False)
            )
            raise InstallationError("; ".join(faults), code="bad_settings") from error


def expand_home(variable: str, path: Path) -> Path:
    """The path with its `~` expanded. Raises InstallationError, which names the `variable`, without a home folder."""
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise InstallationError(
            f"{variable} is {path}, and this user has no home folder: set HOME, or give an absolute path",
            code="bad_settings",
        ) from error


def check_server_url(variable: str, url: str, *, schemes: tuple[str, ...], form: str) -> None:
    """Raise InstallationError unless `url` names a server of one of the `schemes`.

    Parsers take `redis://:pass#word@host` for a URL without a host, and then connect to the local machine. The message
    says what `variable` should look like (`form`), and quotes nothing of the URL: any part may be of its password.
    """
    advice = f"give {form}, with special characters of the password percent-encoded"
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise InstallationError(f"{variable} cannot be read; {advice}", code="bad_settings") from None
    if parts.scheme not in schemes:
        starts = " or ".join(f"{scheme}://" for scheme in schemes)
        raise InstallationError(f"{variable} must start with {starts}; {advice}", code="bad_settings")
    if not parts.hostname:
        raise InstallationError(f"{variable} names no host; {advice}", code="bad_settings")
    if "/" in parts.path[1:].rstrip("/"):
        raise InstallationError(
            f"{variable} has more than one slash after the host; {advice}", code="bad_settings"
        )
    if parts.fragment or "@" in parts.path + parts.query:
        raise InstallationError(
            f"{variable} has a character that ends the password early; {advice}", code="bad_settings"
        )
