"""Callbacks on the command line and in the client, against a running gateway."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from inferq.producer.cli import app, output
from inferq.producer.client.async_client import AsyncClient
from inferq.producer.client.sync_client import Client
from inferq.schemas import InvalidTask
from tests.gateway.conftest import FakePublisher, Gateway
from tests.gateway.test_gateway_callbacks import ended, ended_batch, record, sent


@pytest.fixture
def command(lone_gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("INFERQ_API_URL", lone_gateway.url)
    monkeypatch.setenv("INFERQ_API_KEY", lone_gateway.key)
    return lambda *arguments: CliRunner().invoke(app, ["callback", *arguments])


def test_callbacks_can_be_listed_shown_and_resent(
    lone_gateway: Gateway, publisher: FakePublisher, command: Any
) -> None:
    assert command("list").output.strip() == "none"
    _, callback, records = ended(lone_gateway, "t1")
    failed = record(callback, "failed", reason="8 attempts failed")
    records.note(failed)
    records.keep(failed)
    for arguments in (["list"], ["list", "t1"]):
        (listed,) = json.loads(command(*arguments, "--json").output)
        assert (listed["callback_id"], listed["state"]) == (callback.callback_id, "failed")
    shown = json.loads(command("show", "t1", callback.callback_id, "--json").output)
    assert [attempt["status"] for attempt in shown["attempts"]] == [500]
    assert "oh no" in command("show", "t1", callback.callback_id).output
    unknown = command("show", "t1", "msg_1").exception
    assert isinstance(unknown, InvalidTask)
    assert "no callback 'msg_1'" in unknown.message
    for arguments in (["resend", "t1"], ["resend", "t1", callback.callback_id]):
        (again,) = json.loads(command(*arguments, "--json").output)
        assert (again["callback_id"], again["state"]) == (callback.callback_id, "waiting")
    assert [job["callback"] for job in sent(publisher)] == [callback.model_dump()] * 2


def test_show_needs_a_callback_id_only_if_there_are_several(lone_gateway: Gateway, command: Any) -> None:
    _, callback, records = ended(lone_gateway, "t1")
    assert "task 't1' has no callbacks" in str(command("show", "t1").exception)
    records.note(record(callback, "delivered"))
    assert json.loads(command("show", "t1", "--json").output)["callback_id"] == callback.callback_id
    about = {"event": "task.started", "callback_id": "msg_" + "0" * 32}
    records.note(record(callback.model_copy(update=about), "delivered"))
    several = str(command("show", "t1").exception)
    assert "has 2 callbacks; choose one: " in several
    assert f"{callback.callback_id} (task.succeeded)" in several
    assert f"msg_{'0' * 32} (task.started)" in several


def test_resend_without_an_id_says_how_to_resend_a_delivered_callback(
    lone_gateway: Gateway, publisher: FakePublisher, command: Any
) -> None:
    _, callback, records = ended(lone_gateway, "t1")
    records.note(record(callback, "delivered"))
    refused = command("resend", "t1")
    assert (refused.exit_code, refused.stdout, sent(publisher)) == (1, "", [])
    assert "inferq callback resend t1 CALLBACK_ID" in refused.stderr
    assert command("resend", "t1", callback.callback_id).exit_code == 0
    assert len(sent(publisher)) == 1


def test_the_table_shows_no_password(lone_gateway: Gateway, command: Any) -> None:
    _, callback, records = ended(lone_gateway, "t1")
    url = "https://user:geheim@example.com/h?token=secret"
    records.note(record(callback.model_copy(update={"url": url}), "failed"))
    for arguments in (["list"], ["show", "t1", callback.callback_id]):
        shown = command(*arguments).output
        assert "example.com" in shown.replace("\n", "")
        assert not any(word in shown for word in ("user:", "geheim", "secret"))


def test_the_ids_can_be_read_at_80_columns(
    lone_gateway: Gateway, command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, callback, records = ended(lone_gateway, "t" * 36)
    records.note(record(callback, "failed", reason="gone"))
    for arguments in (["list"], ["show", callback.callback_id]):
        shown = io.StringIO()
        monkeypatch.setattr(output, "console", Console(file=shown, force_terminal=True, width=80))
        command(arguments[0], "t" * 36, *arguments[1:])
        words = shown.getvalue().split()
        assert {callback.callback_id, "t" * 36, "attempts", "task.succeeded"} <= set(words)


def test_callbacks_of_a_batch_are_found_by_its_id(
    lone_gateway: Gateway, publisher: FakePublisher, command: Any
) -> None:
    callback, records = ended_batch(lone_gateway, "b1")
    failed = record(callback, "failed", reason="gone")
    records.note(failed)
    records.keep(failed)
    for arguments in (["list"], ["list", "b1", "--batch"]):
        (listed,) = json.loads(command(*arguments, "--json").output)
        assert (listed["subject_kind"], listed["callback_id"]) == ("batch", callback.callback_id)
    assert "oh no" in command("show", "--batch", "b1", callback.callback_id).output
    unknown = command("show", "--batch", "b1", "msg_1").exception
    assert "batch 'b1' has no callback" in str(unknown)
    for arguments in (["resend", "b1", "--batch"], ["resend", "b1", callback.callback_id, "--batch"]):
        (again,) = json.loads(command(*arguments, "--json").output)
        assert again["state"] == "waiting"
    assert [job["callback"] for job in sent(publisher)] == [callback.model_dump()] * 2


async def test_both_clients_list_and_resend_callbacks(
    lone_gateway: Gateway, publisher: FakePublisher
) -> None:
    _, callback, records = ended(lone_gateway, "t1")
    failed = record(callback, "failed", reason="gone")
    records.note(failed)
    records.keep(failed)
    async with AsyncClient(lone_gateway.url, lone_gateway.key) as client:
        found = await client.callbacks("t1")
        failures = await client.failed_callbacks()
        again = await client.resend("t1")
    assert [r.callback_id for r in (*found, *failures, *again)] == [callback.callback_id] * 3
    with Client(lone_gateway.url, lone_gateway.key) as plain:
        assert [r.callback_id for r in plain.callbacks("t1")] == [callback.callback_id]
        assert plain.resend("t1", callback.callback_id)[0].state == "waiting"
        plain.failed_callbacks(limit=1)
        batchs, records = ended_batch(lone_gateway, "b1")
        records.note(record(batchs, "delivered"))
        assert plain.callbacks("b1", kind="batch")[0].callback_id == batchs.callback_id
        assert plain.resend("b1", batchs.callback_id, kind="batch")[0].state == "waiting"
    assert len(sent(publisher)) == 3
