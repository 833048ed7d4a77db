"""inferq secrets: the secrets that sign callbacks."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from inferq.producer.cli.output import JsonFlag, console, print_json, print_table
from inferq.schemas import InferqError
from inferq.storage.webhook_secrets import KEEP_SECONDS, WebhookSecrets, WebhookSettings

app = typer.Typer(name="secrets", help="Rotate the secrets that sign callbacks.", no_args_is_help=True)

File = Annotated[
    Path | None, typer.Option("--file", help="The file of secrets (default: INFERQ_WEBHOOK_SECRETS_FILE).")
]
Tenant = Annotated[str, typer.Argument(metavar="TENANT", help="The tenant whose callbacks it signs.")]


def _secrets(file: Path | None) -> WebhookSecrets:
    return WebhookSecrets(file or WebhookSettings.load().webhook_secrets_file)


@app.command()
def rotate(
    tenant: Tenant = "default",
    keep: Annotated[
        float, typer.Option(min=0, help="Seconds that the earlier secrets stay valid.")
    ] = KEEP_SECONDS,
    file: File = None,
) -> None:
    """Make a new secret and print it. The earlier secrets sign callbacks, too, until they expire."""
    made = _secrets(file).rotate(tenant, keep=keep)
    console.print(made.secret.get_secret_value(), soft_wrap=True)


@app.command("list")
def list_(file: File = None, as_json: JsonFlag = False) -> None:
    """List the secrets' ids, tenants and times; not the secrets themselves."""
    now = datetime.now(UTC)
    rows = [(s.secret_id, s.tenant, s.valid(now), s.created, s.until) for s in _secrets(file).list()]
    names = ["id", "tenant", "valid", "created", "until"]
    if as_json:
        print_json(
            [
                {
                    name: cell.isoformat() if isinstance(cell, datetime) else cell
                    for name, cell in zip(names, row, strict=True)
                }
                for row in rows
            ]
        )
    else:
        print_table(names, rows)


@app.command()
def show(tenant: Tenant = "default", file: File = None) -> None:
    """Print a tenant's valid secrets, the newest first."""
    found = _secrets(file).of(tenant)
    if not found:
        raise InferqError(
            f"tenant {tenant!r} has no valid secret; make one: inferq secrets rotate {tenant}",
            code="unknown_secret",
        )
    for secret in found:
        console.print(secret, soft_wrap=True)


@app.command()
def revoke(secret_id: Annotated[str, typer.Argument(metavar="SECRET_ID")], file: File = None) -> None:
    """Revoke a secret at once: it signs no more callbacks."""
    _secrets(file).revoke(secret_id)
