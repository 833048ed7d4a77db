"""inferq listen: receive callbacks, verify and print them."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.text import Text

from inferq.producer.cli.listener_settings import ListenSettings
from inferq.producer.cli.output import JsonFlag, console, errors
from inferq.schemas import InstallationError
from inferq.schemas.logs import escape_control
from inferq.storage.webhook_secrets import WebhookSecrets, WebhookSettings

app = typer.Typer()


@app.command()
def listen(
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 0,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    secret: Annotated[
        list[str] | None,
        typer.Option(
            help="A whsec_… secret to verify with (default: INFERQ_WEBHOOK_SECRET, or the file of secrets)."
        ),
    ] = None,
    fail: Annotated[int, typer.Option(min=0, help="Fail this many callbacks first, to see the retries.")] = 0,
    status: Annotated[int, typer.Option(min=200, max=599, help="The HTTP status of those failures.")] = 500,
    as_json: JsonFlag = False,
) -> None:
    """Receive callbacks and verify them, until Ctrl-C. Prints a line for each, and checks its signature."""
    try:
        from inferq.producer.cli.listener import Heard, Listener, check_secret
    except ImportError as error:
        raise InstallationError(
            f"listening needs packages that are not installed ({error}); run: pip install 'inferq[jobs]'"
        ) from error

    setting = ListenSettings.load().webhook_secret
    given = secret or (setting.get_secret_value().split() if setting is not None else [])
    chosen = [check_secret(text) for text in given]
    kept = WebhookSecrets(WebhookSettings.load().webhook_secrets_file)
    lock = threading.Lock()

    def secrets() -> Sequence[str]:
        if chosen:
            return chosen
        tenants = sorted({record.tenant for record in kept.list()})
        return [text for tenant in tenants for text in kept.of(tenant)]

    def show(heard: Heard) -> None:
        with lock:
            if as_json:
                facts = vars(heard) | {"verified": heard.verified}
                sys.stdout.write(escape_control(json.dumps(facts, ensure_ascii=False)) + "\n")
                sys.stdout.flush()
                return
            word = "verified" if heard.verified else f"NOT VERIFIED ({heard.fault})"
            # A batch's end and a night's summary have no sequence.
            number = "" if heard.sequence is None else f" #{heard.sequence}"
            answer = "" if heard.answered < 300 else f", answered {heard.answered}"
            line = f"{heard.type} {heard.subject_id}{number} {word}{answer} {heard.webhook_id}"
            # Anyone may have sent it: a line feed in it could forge a line that says "verified".
            console.print(Text(escape_control(line, keep="")), soft_wrap=True)

    listener = Listener(show, secrets=secrets, host=host, port=port, fail=fail, status=status)
    errors.print(f"listening; submit with: --callback {listener.url}", soft_wrap=True)
    if not secrets():
        errors.print(
            "no secrets to verify with: set INFERQ_WEBHOOK_SECRETS_FILE or give --secret", style="yellow"
        )
    listener.serve()
