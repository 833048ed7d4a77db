"""inferq settings: every variable, with its description, default and value here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Annotated, Any

import typer
from pydantic import SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from inferq.producer.cli.output import JsonFlag, print_json, print_table
from inferq.producer.cli.parts import Parts
from inferq.schemas import Settings, installed_types
from inferq.schemas.publish import DISTRIBUTION

app = typer.Typer()

_SECRETS = ("PASSWORD", "SECRET", "_KEY")


@dataclass(frozen=True)
class Variable:
    """One environment variable that inferq reads."""

    name: str
    default: str
    description: str


def variables(*, plugins: bool = True) -> list[Variable]:
    """Every variable of every part that is installed, in alphabetical order."""
    # Loading the commands and the types loads the settings that they and their engines read.
    parts = Parts()
    modules = [part.module for part in parts.data.values()]
    list(parts.values())
    for (
        module
    ) in modules:  # a command may import its settings, in the module `settings` beside it, when it runs
        settings_module = f"{module.rpartition('.')[0]}.settings"
        if find_spec(settings_module) is not None:
            import_module(settings_module)
    foreign = {t.settings for t in installed_types().values() if t.distribution != DISTRIBUTION}
    found: dict[str, Variable] = {}
    # Sorted by name, because the order of loading is arbitrary.
    for model in sorted(_models(Settings), key=lambda model: model.__name__):
        if model in foreign and not plugins:
            continue
        prefix = str(model.model_config.get("env_prefix", ""))
        for name, field in model.model_fields.items():
            alias = field.validation_alias
            variable = alias if isinstance(alias, str) else f"{prefix}{name}".upper()
            if variable in found:
                continue
            found[variable] = Variable(variable, _default(field), field.description or "")
    return [found[name] for name in sorted(found)]


def _models(parent: type[Settings]) -> Iterator[type[Settings]]:
    for model in parent.__subclasses__():
        yield model
        yield from _models(model)


def _default(field: FieldInfo) -> str:
    if field.default_factory is not None:
        return "(computed)"
    if field.default in (None, PydanticUndefined, ()):
        return ""
    return _plain(field.default)


def _plain(value: Any) -> str:
    match value:
        case SecretStr():
            return "***"
        case bool():
            return str(value).lower()
        case tuple() | list():
            return ",".join(map(str, value))
        case _:
            return str(value)


def _shown(name: str) -> str:
    value = os.environ.get(name, "")
    secret = any(part in name for part in _SECRETS) and not name.endswith("_FILE")
    if value and (secret or "@" in value):
        return "(set)"
    return value


@app.command()
def settings(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the documentation's table, without plug-ins.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """List the settings, their defaults and values here. They are environment variables."""
    # The documentation's page does not depend on the installed plug-ins.
    found = variables(plugins=not markdown)
    if markdown:
        typer.echo("# Settings\n\n`inferq settings --markdown` makes this page.\n")
        typer.echo("| variable | default | description |\n| --- | --- | --- |")
        for variable in found:
            default = f"`{variable.default}`" if variable.default else ""
            typer.echo(f"| `{variable.name}` | {default} | {variable.description} |")
        typer.echo("\nFor the `OTEL_*` variables see [Traces](traces.md).")
    elif as_json:
        print_json([vars(v) | {"value": _shown(v.name) or None} for v in found])
    else:
        print_table(
            ["variable", "value here", "default", "description"],
            [(v.name, _shown(v.name), v.default, v.description) for v in found],
        )
