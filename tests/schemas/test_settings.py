"""What the environment says, as compose files and secrets' files write it."""

from __future__ import annotations

import pytest

from inferq.broker import BrokerSettings
from inferq.consumers.probes.settings import ProbeSettings
from inferq.consumers.worker.settings import WorkerSettings
from inferq.producer.client.settings import ClientSettings
from inferq.producer.gateway.settings import GatewaySettings
from inferq.schemas import InstallationError
from inferq.storage import StatusIndex, StorageSettings, open_store


@pytest.mark.parametrize("empty", ["", " ", "\n"])
def test_an_empty_variable_is_not_set(monkeypatch: pytest.MonkeyPatch, empty: str) -> None:
    for name in ("GATEWAY_HOST", "GATEWAY_PORT", "PROBE_PORT", "S3_ENDPOINT_URL", "API_KEY", "AMQP_CA_FILE"):
        monkeypatch.setenv(f"INFERQ_{name}", empty)
    assert GatewaySettings.load() == GatewaySettings()
    assert GatewaySettings.load().gateway_host == "127.0.0.1"
    assert ProbeSettings.load().probe_port == ProbeSettings.model_fields["probe_port"].default
    assert StorageSettings.load().s3_endpoint_url is None
    assert ClientSettings.load().api_key is None
    assert BrokerSettings.load().amqp_ca_file is None


def test_a_variable_whose_name_is_no_field_is_read_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFERQ_LOAD", "lazy")
    assert WorkerSettings.load().engine_load == "lazy"
    monkeypatch.setenv("INFERQ_LOAD", "late")
    with pytest.raises(InstallationError, match=r"^INFERQ_LOAD: "):
        WorkerSettings.load()


def test_an_empty_url_of_a_server_does_not_mean_the_local_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AMQP_URL", "REDIS_URL", "STORE_URL"):
        monkeypatch.setenv(f"INFERQ_{name}", "")
    with pytest.raises(InstallationError, match="INFERQ_AMQP_URL"):
        BrokerSettings.load().connections("test")
    with pytest.raises(InstallationError, match="INFERQ_REDIS_URL"):
        StatusIndex.from_settings(StorageSettings.load())
    with pytest.raises(InstallationError, match="INFERQ_STORE_URL"):
        open_store(StorageSettings.load())


def test_white_space_around_a_value_is_not_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFERQ_AMQP_URL", "amqp://u:p@host:1/v\n")
    monkeypatch.setenv("INFERQ_API_KEY", " key\n")
    monkeypatch.setenv("INFERQ_AMQP_CA_FILE", "/etc/ca.pem\n")
    (parameters,) = BrokerSettings.load(amqp_ca_file=None).connections("test")
    assert parameters.virtual_host == "v"
    assert str(BrokerSettings.load().amqp_ca_file) == "/etc/ca.pem"
    key = ClientSettings.load().api_key
    assert key is not None
    assert key.get_secret_value() == "key"


@pytest.mark.parametrize(
    "url",
    [
        "amqp://u:12,secret@host:1/",
        "amqp://u:12#secret@host:1/",
        "amqp://:#secret@host:1/",
        "amqp://u:12?secret@host:1/",
        "amqp://u:12/secret@host:1/",
        "amqp://u:secret",
        "amqp:///secret",
        "secret@host",
        "http://u:secret@host/",
        '"amqp://u:secret@host/"',
        "amqp://u:secret@[::1/",
        "amqp://u:secret@host:99999/",
        "amqp://u:secret@host/a/b",
    ],
)
def test_a_broker_url_that_would_lead_elsewhere_is_refused_without_showing_it(url: str) -> None:
    with pytest.raises(InstallationError, match="INFERQ_AMQP_URL") as caught:
        BrokerSettings(amqp_url=url).connections("test")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "amqp://host",
        "amqp://u:p%23q@host:1/v%2Fw?heartbeat=9",
        "amqps://u:p@[::1]:1/",
        "amqp://a:1/,amqp://b:1/",
    ],
)
def test_a_sound_broker_url_is_taken(url: str) -> None:
    assert BrokerSettings(amqp_url=url).connections("test")


@pytest.mark.parametrize(
    "url",
    [
        "redis://:#secret@host:1/",
        "redis://:12#secret@host/0",
        "secret@host",
        "redis:///secret",
        "rediss://:secret",
        "redis://:secret@host/zero",
        "redis://:secret@host/1/2",
    ],
)
def test_a_redis_url_that_would_lead_elsewhere_is_refused_without_showing_it(url: str) -> None:
    with pytest.raises(InstallationError, match="INFERQ_REDIS_URL") as caught:
        StatusIndex.from_settings(StorageSettings(redis_url=url))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "redis://host",
        "redis://host/1/",
        "rediss://:p%23@host:1/2",
        "unix:///run/redis.sock?db=1",
        "rediss://host?ssl_ca_certs=/ca.pem",
    ],
)
def test_a_sound_redis_url_is_taken(url: str) -> None:
    StatusIndex.from_settings(StorageSettings(redis_url=url)).close()


def test_a_store_url_is_not_shown() -> None:
    with pytest.raises(InstallationError) as caught:
        open_store(StorageSettings(store_url="s3://key:secret@bucket/prefix"))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["minio:9000", "127.0.0.1:9000", "http://minio_1:9000", "ftp://x", "http://", "x"]
)
def test_an_s3_endpoint_that_boto3_cannot_use_is_named(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("INFERQ_S3_ENDPOINT_URL", url)
    with pytest.raises(InstallationError, match=r"INFERQ_S3_ENDPOINT_URL: .*http://host:port"):
        StorageSettings.load()


@pytest.mark.parametrize(
    "url", ["http://minio:9000\n", "https://s3.example.com/minio", "http://[::1]:9", "http://10.0.0.1:9"]
)
def test_a_sound_s3_endpoint_is_taken(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("INFERQ_S3_ENDPOINT_URL", url)
    assert StorageSettings.load().s3_endpoint_url == url.strip()
