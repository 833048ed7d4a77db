"""The broker's settings."""

from __future__ import annotations

import ssl
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pika
from pydantic import Field

from inferq.schemas import InstallationError, Settings, check_server_url

_FORM = "amqp://user:password@host:5672/vhost"


class BrokerSettings(Settings):
    """The settings of the connection to RabbitMQ."""

    amqp_url: str = Field(
        "amqp://guest:guest@127.0.0.1:5672/%2F",
        description="The URL of RabbitMQ, `amqp://` or `amqps://`; commas separate the nodes of a cluster.",
    )
    amqp_ca_file: Path | None = Field(
        None, description="CA certificates for `amqps://` (default: the system's)."
    )
    amqp_cert_file: Path | None = Field(None, description="Client certificate for `amqps://`.")
    amqp_key_file: Path | None = Field(None, description="Key of the client certificate.")
    amqp_heartbeat: int = Field(
        30,
        ge=5,
        le=3600,
        description="Seconds between heartbeats. `?heartbeat=` in the URL takes precedence.",
    )
    amqp_connect_timeout: float = Field(
        10.0, gt=0, description="Seconds that one connection attempt may take."
    )
    amqp_blocked_limit: float = Field(
        10.0,
        gt=0,
        description="Seconds that a memory or disk alarm may block publishing; then publishing fails.",
    )
    publish_window: int = Field(
        2000, ge=1, description="The most published messages that wait for their confirm."
    )
    publish_timeout: float = Field(
        30.0, gt=0, description="Seconds to wait for a confirm; then publishing fails."
    )

    def connections(self, name: str) -> list[pika.URLParameters]:
        """The parameters of each node, in order. RabbitMQ lists the connection under `name`.

        Raises InstallationError if a URL is malformed or a certificate cannot be read.
        """
        urls = [url.strip() for url in self.amqp_url.split(",") if url.strip()]
        if not urls:
            raise InstallationError(f"INFERQ_AMQP_URL is empty; give {_FORM}", code="bad_settings")
        if len(urls) > 1 and any("://" not in url for url in urls):
            raise InstallationError(
                "INFERQ_AMQP_URL has a comma that does not stand between two URLs; write a comma of the password "
                "as %2C",
                code="bad_settings",
            )
        return [self._parameters(url, name) for url in urls]

    def _parameters(self, url: str, name: str) -> pika.URLParameters:
        check_server_url("INFERQ_AMQP_URL", url, schemes=("amqp", "amqps"), form=_FORM)
        try:
            parameters = pika.URLParameters(url)
        except (ValueError, TypeError, IndexError) as error:
            # The parser's message may quote a part of the password.
            raise InstallationError(
                f"INFERQ_AMQP_URL cannot be read; give {_FORM}", code="bad_settings"
            ) from error
        if "heartbeat" not in parse_qs(urlsplit(url).query):
            parameters.heartbeat = self.amqp_heartbeat
        parameters.socket_timeout = self.amqp_connect_timeout
        parameters.stack_timeout = self.amqp_connect_timeout
        # The publisher watches for blocking; pika's own limit would close the whole connection.
        parameters.blocked_connection_timeout = None
        parameters.connection_attempts = 1
        parameters.client_properties = {"connection_name": f"inferq {name}"}
        if urlsplit(url).scheme == "amqps":
            parameters.ssl_options = pika.SSLOptions(self._tls(), parameters.host)
        return parameters

    def _tls(self) -> ssl.SSLContext:
        try:
            context = ssl.create_default_context(cafile=self.amqp_ca_file)
            if self.amqp_cert_file is not None:
                context.load_cert_chain(self.amqp_cert_file, self.amqp_key_file)
        except (OSError, ssl.SSLError) as error:
            raise InstallationError(
                f"INFERQ_AMQP_CA_FILE, _CERT_FILE or _KEY_FILE cannot be read: {error}"
            ) from error
        return context
