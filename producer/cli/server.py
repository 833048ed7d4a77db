"""inferq gateway."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

app = typer.Typer()


@app.command()
def gateway(
    host: Annotated[str | None, typer.Option(help="Address to listen on (INFERQ_GATEWAY_HOST).")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 takes a free one (INFERQ_GATEWAY_PORT).")] = None,
) -> None:
    """Serve the HTTP interface, until SIGTERM."""
    from producer.gateway import serve

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    serve(host, port, on_listening=lambda url: logging.getLogger(__name__).info("listening on %s", url))
