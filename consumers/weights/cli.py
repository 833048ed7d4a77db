"""inferq weights: lists, fetches, verifies and signs the weights of the manifest."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from inferq.consumers.weights.cache import WeightsCache, WeightsSettings
from inferq.consumers.weights.manifest import WeightsRefused, describe, read_manifest, sign

app = typer.Typer()
weights = typer.Typer(no_args_is_help=True)
app.add_typer(weights, name="weights", help="Fetch, check and sign the engines' weights.")

Names = Annotated[
    list[str] | None, typer.Argument(metavar="[NAME]...", help="Names of weights (default: all).")
]

_PIPE_WIDTH = 10_000
"""The width of a table that is not printed to a terminal: nothing wraps."""

_console = Console(highlight=False, markup=False, emoji=False)


@weights.command("list")
def list_(as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False) -> None:
    """List the manifest's weights, and the versions in the cache."""
    cache = WeightsCache(WeightsSettings.load())
    manifest = cache.manifest()
    others = {name: [v for v in cache.versions(name) if v != manifest[name].version] for name in manifest}
    if as_json:
        rows = [
            {
                "name": name,
                "version": entry.version,
                "bytes": entry.size,
                "files": len(entry.files),
                "here": cache.held(name),
                "other_versions": others[name],
                "source": entry.source,
            }
            for name, entry in sorted(manifest.items())
        ]
        sys.stdout.write(json.dumps(rows, ensure_ascii=False, indent=2) + "\n")
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("name", "version", "size", "files", "here", "also here", "source"):
        table.add_column(column, overflow="fold", no_wrap=column == "name")
    for name, entry in sorted(manifest.items()):
        here = "yes" if cache.held(name) else "no"
        table.add_row(
            name, entry.version, decimal(entry.size), str(len(entry.files)), here,
            ", ".join(others[name]), entry.source,
        )  # fmt: skip
    console = _console if _console.is_terminal else Console(width=_PIPE_WIDTH)
    console.print(table)


def _say(text: str) -> None:
    _console.print(text, soft_wrap=True)


@weights.command()
def pull(names: Names = None) -> None:
    """Fetch the current versions into the cache, and remove older versions that are not in use."""
    cache = WeightsCache(WeightsSettings.load())
    manifest = cache.manifest()
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    for name in names or sorted(manifest):
        size = manifest[name].size if name in manifest else None
        with Progress(*columns, console=_console, transient=True) as bar:
            task = bar.add_task(name, total=size)
            folder = cache.pull(name, lambda count: bar.advance(task, count))  # noqa: B023
        _say(f"{name}: {folder}")
        for version in cache.prune(name):
            _say(f"{name}: removed version {version}, which is not in use")


@weights.command()
def verify(names: Names = None) -> None:
    """Compare every file of the current versions with the manifest. Exits with 1 if one differs."""
    cache = WeightsCache(WeightsSettings.load())
    faults = []
    for name in names or sorted(cache.manifest()):
        try:
            cache.verify(name)
        except WeightsRefused as error:
            faults.append(str(error))
        else:
            _say(f"{name}: all files match the manifest")
    if faults:
        raise WeightsRefused("\n".join(faults))


@weights.command("sign")
def sign_(
    manifest: Annotated[Path, typer.Argument(help="The weights.toml to sign.")],
    key: Annotated[Path, typer.Option(help="The ed25519 private key, a PEM file.")],
) -> None:
    """Sign the manifest. Writes the signature beside it, as MANIFEST.sig."""
    try:
        data = manifest.read_bytes()
    except OSError as error:
        raise WeightsRefused(f"{manifest} cannot be read: {error.strerror}") from error
    read_manifest(data, str(manifest))
    signature = manifest.with_name(manifest.name + ".sig")
    signature.write_bytes(sign(data, key))
    _say(f"written to {signature}")


@weights.command("describe")
def describe_(
    name: Annotated[str, typer.Argument(help="The name of the weights in the manifest.")],
    version: Annotated[str, typer.Argument(help="The version in the folder.")],
    source: Annotated[
        str, typer.Argument(help="The URL that will hold the files: s3://, file:// or https://.")
    ],
    folder: Annotated[Path, typer.Argument(help="The folder with the files.", file_okay=False, exists=True)],
) -> None:
    """Print the manifest's table for a folder of weights, with the sizes and SHA-256 of its files."""
    sys.stdout.write(describe(name, version, source, folder))
