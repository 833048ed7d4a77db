"""inferq keys: the gateway's API keys."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from inferq.producer.cli.output import JsonFlag, console, errors, print_json, print_table
from inferq.producer.gateway.keys import KeyFile
from inferq.producer.gateway.settings import GatewaySettings

app = typer.Typer(name="keys", help="Add, list and remove API keys.", no_args_is_help=True)

File = Annotated[Path | None, typer.Option("--file", help="The key file (default: INFERQ_API_KEYS_FILE).")]


def _keys(file: Path | None) -> KeyFile:
    return KeyFile(file or GatewaySettings.load().api_keys_file)


@app.command()
def add(
    tenant: Annotated[
        str, typer.Argument(metavar="TENANT", help="The tenant whose tasks the key may see and submit.")
    ],
    name: Annotated[str, typer.Option(help="A note on the key's purpose.")] = "",
    file: File = None,
) -> None:
    """Make a key and print it once; the file keeps only its hash."""
    kept = file or GatewaySettings.load().api_keys_file
    console.print(KeyFile(kept).add(tenant, name=name), soft_wrap=True)
    errors.print(f"the key's hash is in {kept}", soft_wrap=True)


@app.command("list")
def list_(file: File = None, as_json: JsonFlag = False) -> None:
    """List the keys' ids, tenants and notes."""
    found = _keys(file).list()
    if as_json:
        print_json(list(found))
    else:
        print_table(
            ["id", "tenant", "name", "created"], [(k.key_id, k.tenant, k.name, k.created) for k in found]
        )


@app.command()
def remove(key_id: Annotated[str, typer.Argument(metavar="KEY_ID")], file: File = None) -> None:
    """Remove a key; the gateway refuses it from then on."""
    _keys(file).remove(key_id)
