"""Webhook secrets: rotation with two valid at once, a private file, changes that show at once."""

from __future__ import annotations

import json
import os
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from standardwebhooks import Webhook

from inferq.consumers.callbacks.sending import signatures
from inferq.schemas import InferqError, InstallationError
from inferq.storage import WebhookSecrets
from tests.callbacks.conftest import callback


@pytest.fixture
def secrets(tmp_path: Path) -> WebhookSecrets:
    return WebhookSecrets(tmp_path / "some" / "secrets.json")


def test_rotation_keeps_the_secret_of_before_valid_for_a_while(secrets: WebhookSecrets) -> None:
    first = secrets.rotate("acme").secret.get_secret_value()
    second = secrets.rotate("acme", keep=3600).secret.get_secret_value()
    assert secrets.of("acme") == (second, first)
    third = secrets.rotate("acme", keep=0).secret.get_secret_value()
    assert secrets.of("acme") == (third,)
    assert secrets.of("other") == ()


@pytest.mark.parametrize("keep", [1e12, float("inf"), float("nan")])
def test_a_time_that_no_clock_reaches_is_refused_and_nothing_rotated(
    secrets: WebhookSecrets, keep: float
) -> None:
    with pytest.raises(InferqError, match="cannot be kept for"):
        secrets.rotate("acme", keep=keep)
    assert secrets.list() == ()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can write another's file")
def test_what_root_rotates_stays_its_owners(secrets: WebhookSecrets, tmp_path: Path) -> None:
    folder = tmp_path / "some"
    folder.mkdir()
    os.chown(folder, 12345, 23456)
    for _ in range(2):
        secrets.rotate("acme")
        for name in ("secrets.json", "secrets.json.lock"):
            about = (folder / name).stat()
            assert (about.st_uid, about.st_gid, stat.S_IMODE(about.st_mode)) == (12345, 23456, 0o600)


def test_fields_of_a_later_version_stay_in_the_file(secrets: WebhookSecrets, tmp_path: Path) -> None:
    secrets.rotate("default")
    file = next(tmp_path.rglob("*.json"))
    file.write_text(json.dumps([record | {"purpose": "x"} for record in json.loads(file.read_text())]))
    secrets.rotate("default")
    assert [record.get("purpose") for record in json.loads(file.read_text())] == ["x", None]


def test_a_later_rotation_does_not_prolong_an_old_secret(secrets: WebhookSecrets) -> None:
    secrets.rotate("acme")
    secrets.rotate("acme", keep=60)
    secrets.rotate("acme", keep=86400)
    (oldest, *_) = secrets.list()
    assert oldest.until is not None
    assert oldest.until < datetime.now(UTC) + timedelta(seconds=61)


def test_a_revoked_secret_is_gone_and_other_processes_see_it(secrets: WebhookSecrets, tmp_path: Path) -> None:
    made = secrets.rotate("acme")
    other = WebhookSecrets(tmp_path / "some" / "secrets.json")
    assert len(other.of("acme")) == 1
    secrets.revoke(made.secret_id)
    assert other.of("acme") == ()
    with pytest.raises(InferqError, match="inferq secrets list"):
        secrets.revoke(made.secret_id)


def test_the_file_is_private_and_no_message_quotes_it(secrets: WebhookSecrets, tmp_path: Path) -> None:
    secrets.rotate("acme")
    file = tmp_path / "some" / "secrets.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert secrets.list()[0].secret.get_secret_value() not in repr(secrets.list())
    file.write_text(json.dumps([{"tenant": "acme", "secret": "whsec_private", "created": "never"}]))
    with pytest.raises(InstallationError, match="INFERQ_WEBHOOK_SECRETS_FILE") as refused:
        secrets.list()
    assert "whsec_private" not in str(refused.value)
    with pytest.raises(InferqError, match="bad/name"):
        WebhookSecrets(tmp_path / "x.json").rotate("bad/name")


@pytest.mark.parametrize("secret", ["whsec_!!!", "whsec_", "whsec_abc", "c2VjcmV0", "whsec_ö", ""])
def test_a_secret_that_cannot_sign_is_refused_as_the_file_is_read(
    secrets: WebhookSecrets, tmp_path: Path, secret: str
) -> None:
    secrets.rotate("acme")
    file = tmp_path / "some" / "secrets.json"
    records = json.loads(file.read_text())
    file.write_text(json.dumps([*records, records[0] | {"secret": secret}]))
    with pytest.raises(InstallationError, match=r"1\.secret"):
        WebhookSecrets(file).of("acme")


def test_the_reference_library_verifies_each_signature_over_the_exact_bytes(secrets: WebhookSecrets) -> None:
    secrets.rotate("acme")
    secrets.rotate("acme")
    sent = callback("https://example.com/", tenant="acme")
    now = datetime.now(UTC)
    headers = {
        "webhook-id": sent.callback_id,
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": signatures(sent, secrets.of("acme"), now),
    }
    for secret in secrets.of("acme"):
        assert Webhook(secret).verify(sent.body.encode(), headers)["type"] == "task.succeeded"
