"""Whether the object store can be used is known without waiting for it."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from inferq.storage import LocalStore, StoreOutage, StoreWatch
from tests.waiting import eventually


def test_a_store_that_takes_no_writes_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path)
    broken, ping = threading.Event(), store.ping

    def maybe() -> None:
        if broken.is_set():
            raise StoreOutage("S3 refuses bucket 'results' (AccessDenied)")
        ping()

    monkeypatch.setattr(store, "ping", maybe)
    watch = StoreWatch(store, every=0.01, again=0.01)
    assert watch.waiting_for == "object store: not checked yet"
    watch.start()
    eventually(lambda: watch.waiting_for is None)
    broken.set()
    eventually(lambda: watch.waiting_for == "object store: S3 refuses bucket 'results' (AccessDenied)")
    broken.clear()
    eventually(lambda: watch.waiting_for is None)
    watch.close()


def test_a_store_that_hangs_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path)
    answers, hung = threading.Event(), threading.Event()
    answers.set()

    def slow() -> None:
        if not answers.is_set():
            hung.set()
        answers.wait()

    monkeypatch.setattr(store, "ping", slow)
    watch = StoreWatch(store, every=0.01, again=0.01, hanging=0.1)
    watch.start()
    eventually(lambda: watch.waiting_for is None)
    answers.clear()
    hung.wait(5)
    eventually(lambda: watch.waiting_for == "object store: no answer within 0.1 s")
    answers.set()
    eventually(lambda: watch.waiting_for is None)
    watch.close()
