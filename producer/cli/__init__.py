"""The `inferq` command."""

from producer.cli.main import app, main

__all__ = ["app", "main"]
