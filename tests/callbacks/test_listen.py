"""`inferq listen`: a line for each callback, verified or not, and failures on demand."""

from __future__ import annotations

import json
import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from inferq.consumers.callbacks.sending import signatures
from inferq.producer.cli import app
from inferq.producer.cli.listener import Heard, Listener
from inferq.storage import WebhookSecrets
from tests.callbacks.conftest import Caller, callback
from tests.waiting import eventually
from tests.worker.conftest import Site


@contextmanager
def listening(folder: Path, *arguments: str, **settings: str) -> Iterator[tuple[str, Path]]:
    """`inferq listen` as a process: its URL, and the file that its lines go to."""
    out, log = folder / "heard.txt", folder / "listen.log"
    env = {"PATH": "/usr/bin:/bin", "HOME": str(folder), **settings}
    with out.open("wb") as lines, log.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "inferq.producer.cli", "listen", *arguments],
            env=env,
            stdout=lines,
            stderr=errors,
        )
    try:
        found = eventually(lambda: re.search(r"--callback (\S+)", log.read_text()), "a URL")
        yield found[1], out
    finally:
        process.kill()
        process.wait()


def heard(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_it_tells_what_verifies_from_what_does_not(tmp_path: Path) -> None:
    secrets = WebhookSecrets(tmp_path / "secrets.json")
    good = secrets.rotate("default").secret.get_secret_value()
    bad = WebhookSecrets(tmp_path / "other.json").rotate("default").secret.get_secret_value()
    sent = callback("https://example.com/")
    now = datetime.now(UTC)
    headers = {"webhook-id": sent.callback_id, "webhook-timestamp": str(int(now.timestamp()))}
    with listening(
        tmp_path, "--json", "--fail", "1", "--status", "503",
        INFERQ_WEBHOOK_SECRETS_FILE=str(tmp_path / "secrets.json"),
    ) as (url, out):  # fmt: skip

        def post(signature: str | None, body: str = sent.body) -> int:
            given = headers | ({"webhook-signature": signature} if signature is not None else {})
            return httpx.post(url, content=body.encode(), headers=given).status_code

        right = signatures(sent, [bad, good], now)
        assert post(right) == 503
        assert post(right) == 204
        for signature in (signatures(sent, [bad], now), None, "nonsense", "v1,!!!"):
            assert post(signature) == 401
        assert post(right, sent.body + " ") == 401
        assert httpx.get(url).status_code == 405
        lines = eventually(lambda: len(found := heard(out)) == 7 and found)
    assert [line["verified"] for line in lines] == [True, True, False, False, False, False, False]
    assert (lines[0]["type"], lines[0]["sequence"]) == ("task.succeeded", 10_000_009_999_999)
    assert lines[0]["webhook_id"] == sent.callback_id
    assert all(line["fault"] for line in lines[2:])


def test_a_task_is_called_back_from_submission_to_the_listener(site: Site, caller: Caller) -> None:
    site.worker("echo")
    caller.start()
    with listening(site.folder, INFERQ_WEBHOOK_SECRETS_FILE=str(caller.file)) as (url, out):
        task_id = site.publish({"task_type": "echo", "payload": 1, "callback_url": url})
        line = eventually(lambda: out.read_text().splitlines())[0]
    assert line.startswith(f"task.succeeded {task_id} #10000009999999 verified msg_")


def test_the_secrets_to_verify_with_are_a_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = WebhookSecrets(tmp_path / "secrets.json")
    old, new = (kept.rotate("default").secret.get_secret_value() for _ in range(2))
    sent, now = callback("https://example.com/"), datetime.now(UTC)
    with listening(tmp_path, "--json", INFERQ_WEBHOOK_SECRET=f"{old} {new}") as (url, out):
        for secret in (old, new):
            headers = {
                "webhook-id": sent.callback_id,
                "webhook-timestamp": str(int(now.timestamp())),
                "webhook-signature": signatures(sent, [secret], now),
            }
            httpx.post(url, content=sent.body.encode(), headers=headers)
        lines = eventually(lambda: len(found := heard(out)) == 2 and found)
    assert [line["verified"] for line in lines] == [True, True]
    monkeypatch.setenv("INFERQ_WEBHOOK_SECRET", new)
    listed = json.loads(CliRunner().invoke(app, ["settings", "--json"]).output)
    assert [row["value"] for row in listed if row["name"] == "INFERQ_WEBHOOK_SECRET"] == ["(set)"]


def test_it_names_the_run_and_the_batch_that_a_callback_is_of(tmp_path: Path) -> None:
    with listening(tmp_path) as (url, out):
        for kind, subject in (("nightly.summary", "run_id"), ("batch.completed", "batch_id")):
            httpx.post(url, json={"type": kind, "data": {subject: "mine"}})
        lines = eventually(lambda: len(found := out.read_text().splitlines()) == 2 and found)
    assert [line.partition(" (")[0] for line in lines] == [
        "nightly.summary mine NOT VERIFIED",
        "batch.completed mine NOT VERIFIED",
    ]


def test_a_stranger_writes_no_lines_and_no_commands(tmp_path: Path) -> None:
    body = json.dumps({"type": "\x1b[2Ja\ntask.succeeded t #1 verified msg_1"})
    with listening(tmp_path) as (url, out):
        assert httpx.post(url, content=body, headers={"webhook-id": "\x1b[31m"}).status_code == 401
        (line,) = eventually(lambda: out.read_text().splitlines())
    assert line.startswith(r"\u001b[2Ja\u000atask.succeeded t #1 verified msg_1 ? NOT VERIFIED")
    assert "\x1b" not in line


@pytest.mark.parametrize("resets", [True, False], ids=["by a reset", "in good order"])
def test_a_caller_that_breaks_off_is_no_error(capfd: pytest.CaptureFixture[str], resets: bool) -> None:
    heard: list[Heard] = []
    listener = Listener(heard.append, secrets=tuple)
    threading.Thread(target=listener.serve, daemon=True).start()

    def serving() -> bool:
        return any("process_request_thread" in thread.name for thread in threading.enumerate())

    with socket.create_connection(("127.0.0.1", listener.port)) as line:
        line.sendall(b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\n{")
        eventually(serving, "a request that is being served")
        if resets:
            line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    eventually(lambda: not serving(), "the end of the request")
    listener.close()
    assert capfd.readouterr().err == ""
    assert heard == []


def test_a_secret_that_is_none_is_refused(tmp_path: Path) -> None:
    for secret in ("whsec_", "whsec_!", "ö"):
        result = CliRunner().invoke(app, ["listen", "--secret", secret])
        assert "inferq secrets show" in str(result.exception)


def test_a_malformed_callback_url_is_refused_on_the_queue(site: Site) -> None:
    site.worker("echo")
    site.publish({"task_id": "t", "task_type": "echo", "callback_url": "mailto:me@example.com"})
    error = site.ended("t").error
    assert error is not None
    assert "callback_url" in error.message
    assert site.depth("inference.callbacks") == 0


NODE = """
const { Webhook } = require("standardwebhooks");
const given = JSON.parse(require("fs").readFileSync(0, "utf8"));
for (const secret of given.secrets) {
  const event = new Webhook(secret).verify(given.body, given.headers);
  console.log(event.type, event.data.output.payload);
}
try {
  new Webhook(given.secrets[0]).verify(given.body + " ", given.headers);
  console.log("forged");
} catch { console.log("refused"); }
"""


def test_nodes_reference_library_verifies_what_is_sent(tmp_path: Path) -> None:
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed")
    installed = subprocess.run(
        ["npm", "install", "--no-audit", "--no-fund", "--silent", "standardwebhooks@1"],
        cwd=tmp_path, capture_output=True, text=True, timeout=90,
    )  # fmt: skip
    if installed.returncode:
        pytest.skip(f"npm cannot install standardwebhooks here: {installed.stderr.strip()[-200:]}")
    kept = WebhookSecrets(tmp_path / "secrets.json")
    kept.rotate("default")
    kept.rotate("default")
    secrets = kept.of("default")
    sent = callback("https://example.com/")
    now = datetime.now(UTC)
    headers = {
        "webhook-id": sent.callback_id,
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": signatures(sent, secrets, now),
    }
    given = json.dumps({"secrets": secrets, "headers": headers, "body": sent.body})
    said = subprocess.run(
        ["node", "-e", NODE], cwd=tmp_path, input=given, capture_output=True, text=True, timeout=30
    )
    assert said.returncode == 0, said.stderr
    assert said.stdout.splitlines() == ["task.succeeded Grüße 你好"] * 2 + ["refused"]


def test_secrets_on_the_command_line(tmp_path: Path) -> None:
    file = str(tmp_path / "secrets.json")
    run = CliRunner().invoke
    made = run(app, ["secrets", "rotate", "acme", "--file", file]).output.strip()
    assert made.startswith("whsec_")
    again = run(app, ["secrets", "rotate", "acme", "--keep", "60", "--file", file]).output.strip()
    assert run(app, ["secrets", "show", "acme", "--file", file]).output.split() == [again, made]
    listed = json.loads(run(app, ["secrets", "list", "--json", "--file", file]).output)
    assert [row["valid"] for row in listed] == [True, True]
    assert made not in str(listed)
    run(app, ["secrets", "revoke", listed[0]["id"], "--file", file])
    assert run(app, ["secrets", "show", "acme", "--file", file]).output.split() == [again]
    assert "inferq secrets rotate other" in str(
        run(app, ["secrets", "show", "other", "--file", file]).exception
    )
