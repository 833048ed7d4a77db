"""The `inferq` command."""

from inferq.producer.cli.main import app, main

__all__ = ["app", "main"]
