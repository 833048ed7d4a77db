"""The settings of those who send, and of who listens to what comes of it."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, SecretStr

from inferq.schemas import Settings


class GatewaySettings(Settings):
    """The HTTP gateway's own settings; where the broker and the store are is said by theirs."""

    gateway_host: str = Field("127.0.0.1", description="Address that the gateway listens on.")
    gateway_port: int = Field(8000, ge=0, le=65535, description="Port of the gateway; 0 takes a free one.")
    api_keys_file: Path = Field(
        Path(".inferq/api-keys.json"), description="The file of API keys (digests only) and their tenants."
    )
    max_upload_bytes: int = Field(512 * 1024 * 1024, gt=0, description="Largest file taken, in bytes.")
    max_uploads: int = Field(32, gt=0, description="Uploads taken at once; more of them wait.")
    submit_timeout: float = Field(
        5.0, gt=0, description="Seconds to wait for the broker to confirm a task before answering 503."
    )
    body_timeout: float = Field(
        30.0, gt=0, description="Seconds that a client may leave between two pieces of a request's body."
    )
    events_heartbeat: float = Field(
        15.0, gt=0, description="Seconds between two heartbeats of an event stream."
    )
    shutdown_grace: float = Field(
        10.0, gt=0, description="Seconds that requests in hand get to finish when the gateway stops."
    )


class NightlySettings(Settings):
    """Where the schedules of nightly runs are, and where beat's probes are served."""

    schedules_file: Path = Field(
        Path(".inferq/schedules.toml"),
        description="The schedules of nightly runs, which `inferq beat` starts.",
    )
    probe_host: str = Field(
        "127.0.0.1", description="Address of /healthz, /readyz and /metrics; 0.0.0.0 in a container."
    )
    probe_port: int | None = Field(
        None, ge=0, le=65535, description="Port of /healthz, /readyz and /metrics; none: not served."
    )


class ClientSettings(Settings):
    """Where the Python client and the command line send, and as whom."""

    api_url: str = Field(
        "http://127.0.0.1:8000",
        description="The gateway as its users reach it: where clients send, and the base of links to files.",
    )
    api_key: SecretStr | None = Field(None, description="API key that a client shows to the gateway.")


class ListenSettings(Settings):
    """What `inferq listen` verifies callbacks with."""

    webhook_secret: SecretStr | None = Field(
        None,
        description="What `inferq listen` verifies callbacks with: a secret, or several with spaces between "
        "them; without one, those in the file of secrets.",
    )


class BatchSettings(Settings):
    """How batches are fed, and their results put together."""

    batch_slice: float = Field(
        60.0, gt=0, le=600, description="Seconds that a feeder works on a batch before it hands it on."
    )
    batch_lease: int = Field(
        20, ge=1, le=600, description="Seconds after which a feeder that says nothing more is replaced."
    )
    batch_doubt: float = Field(
        10.0,
        gt=0,
        description="Seconds without any end after which a batch's tasks in flight are looked up in the "
        "object store, since Redis may have missed their ends; then again at ever longer intervals.",
    )
    batch_readers: int = Field(
        8, ge=1, le=64, description="Results read from the object store at a time, for each batch."
    )
