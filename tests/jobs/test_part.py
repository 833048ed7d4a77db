"""The name that `inferq callbacks` has in logs and traces."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import typer

from inferq.consumers.jobs import cli, worker
from inferq.schemas import tracing


@pytest.mark.parametrize(
    ("queues", "part"), [(None, "callbacks"), ("callbacks", "callbacks"), ("batches", "batches")]
)
def test_logs_and_spans_name_the_same_part(
    monkeypatch: pytest.MonkeyPatch, queues: str | None, part: str
) -> None:
    logged, traced = [], []

    @contextmanager
    def exporting(name: str) -> Iterator[None]:
        traced.append(name)
        yield

    monkeypatch.setattr(cli, "start_log", logged.append)
    monkeypatch.setattr(tracing, "exporting", exporting)
    monkeypatch.setattr(worker, "work", lambda *_, **__: 0)
    monkeypatch.setattr(os, "nice", lambda _: 0)
    with pytest.raises(typer.Exit):
        cli.callbacks(queues, 1, False)
    assert (logged, traced) == ([part], [part])
