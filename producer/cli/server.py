"""inferq gateway."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from inferq.broker import BrokerSettings
from inferq.producer.gateway.settings import GatewaySettings
from inferq.schemas import tracing
from inferq.schemas.logs import LogSettings, start_log
from inferq.storage import StorageSettings

app = typer.Typer()


@app.command()
def gateway(
    host: Annotated[str | None, typer.Option(help="Address to listen on (INFERQ_GATEWAY_HOST).")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 takes a free one (INFERQ_GATEWAY_PORT).")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Check the settings and the installation, then exit.")
    ] = False,
) -> None:
    """Serve the HTTP interface, until SIGTERM."""
    from inferq.producer.gateway.server import serve

    if check:
        for settings in (GatewaySettings, BrokerSettings, StorageSettings, LogSettings):
            settings.load()
        tracing.wanted()
        typer.echo("gateway: settings are in order")
        return
    start_log("gateway")
    with tracing.exporting("gateway"):
        serve(host, port, on_listening=lambda url: logging.getLogger(__name__).info("listening on %s", url))
