"""Makes one attempt to deliver a callback: signs the exact bytes, sends them, reports the result."""

from __future__ import annotations

import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from ipaddress import ip_network

import httpcore
from standardwebhooks import Webhook

from inferq.consumers.callbacks.decision import retry_after_seconds
from inferq.consumers.callbacks.settings import CallbackSettings
from inferq.schemas import Callback, CallbackAttempt, InvalidTask
from inferq.schemas.http_url import HttpUrl, parse_http_url
from inferq.schemas.trace_context import TraceContext
from inferq.storage.fetch.addresses import AddressPolicy
from inferq.storage.fetch.pool import HttpPool, header_of
from inferq.storage.settings import Network

_LOOPBACK = (ip_network("127.0.0.0/8"), ip_network("::1/128"))
_PUBLIC = AddressPolicy()
_RESPONSE_BYTES = 1024
_ERROR_CHARACTERS = 300


@dataclass(frozen=True)
class Sent:
    """The result of an attempt. `retry_after`: the receiver's `Retry-After`, in seconds.

    `tried`: whether a connection to the receiver was attempted.
    """

    attempt: CallbackAttempt
    retry_after: float | None = None
    timed_out: bool = False
    tried: bool = True


class Sender:
    """Sends callbacks; safe from many threads. Tests replace `public`.

    A tenant reads the answers to its callbacks, so only those of `public` addresses are kept: an allowed private
    network may hold services that answer anybody on it.
    """

    def __init__(self, settings: CallbackSettings, *, public: AddressPolicy = _PUBLIC) -> None:
        self._timeout = settings.callback_timeout
        self._public = public
        self._local_tenants = settings.callback_loopback_tenants

        def pool(*more: Network) -> HttpPool:
            allowed = (*settings.callback_allowed_networks, *more)
            return HttpPool(
                AddressPolicy(allowed, setting="INFERQ_CALLBACK_ALLOWED_NETWORKS"),
                agent=f"inferq/{version('inferq')}",
                patience=self._timeout,  # the deadline of the whole attempt applies
                connections=None,  # a thread uses one at a time; a wait here would count as the target's delay
            )

        # Addresses are checked when a connection is made, so tenants with different rules share no connections.
        self._pool, self._local_pool = pool(), pool(*_LOOPBACK)

    def close(self) -> None:
        self._pool.close()
        self._local_pool.close()

    def send(self, callback: Callback, secrets: Sequence[str], *, trace: TraceContext | None = None) -> Sent:
        """Make one attempt, signed with each of the secrets (at least one). The receiver may continue the `trace`."""
        now = datetime.now(UTC)
        began = time.monotonic()
        status = error = response = retry_after = None
        timed_out = False
        pool = self._local_pool if callback.tenant in self._local_tenants else self._pool
        try:
            url = parse_http_url(callback.url)
            with (
                pool.deadline(self._timeout),
                pool.exchange(
                    "POST", url, _headers(callback, secrets, url, now, trace), callback.body.encode()
                ) as answer,
            ):
                status = answer.status
                retry_after = retry_after_seconds(header_of(answer, b"retry-after"), now)
                address = _address(answer)
                beginning = _beginning(answer)
                response = beginning if self._public.permits(address) else None
        except httpcore.TimeoutException:
            timed_out = True
            if status is None:
                error = f"no response within {self._timeout:g} s"
            else:
                # An endless response may mean that the callback was not accepted, and it blocks others.
                error = f"status {status}, but the response did not end within {self._timeout:g} s"
                status = None
        except InvalidTask as refused:
            error = f"{refused.code}: {refused.message}"
        except httpcore.ConnectError as failed:
            cause = failed.__cause__ or failed.__context__
            if isinstance(cause, ssl.SSLCertVerificationError):
                error = f"certificate_refused: the server's certificate is invalid: {cause.verify_message}"
            else:
                error = f"the connection failed: {failed}"
        except httpcore.NetworkError as failed:
            error = f"the connection was lost: {failed}"
        except httpcore.ProtocolError:  # its text quotes what the server sent
            error = "the server's answer is not HTTP, or incomplete"
        attempt = CallbackAttempt(
            at=now,
            seconds=round(time.monotonic() - began, 3),
            status=status,
            error=error[:_ERROR_CHARACTERS] if error is not None else None,
            response=response,
        )
        return Sent(attempt, retry_after, timed_out)


def signatures(callback: Callback, secrets: Sequence[str], moment: datetime) -> str:
    """One signature per secret, separated by spaces. `moment` is in UTC; whole seconds count."""
    return " ".join(Webhook(secret).sign(callback.callback_id, moment, callback.body) for secret in secrets)


def _headers(
    callback: Callback, secrets: Sequence[str], url: HttpUrl, now: datetime, trace: TraceContext | None
) -> dict[str, str]:
    headers = {
        "Content-Type": "application/json",
        "Accept-Encoding": "identity",
        "webhook-id": callback.callback_id,
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": signatures(callback, secrets, now),
    }
    if trace is not None:
        headers.update(trace.headers())
    if url.credentials:
        headers["Authorization"] = f"Basic {url.credentials.decode()}"
    return headers


def _address(answer: httpcore.Response) -> str:
    """The IP address that answers; empty if the connection is gone."""
    try:
        return str(answer.extensions["network_stream"].get_extra_info("server_addr")[0])
    except OSError:
        return ""


def _beginning(answer: httpcore.Response) -> str | None:
    """The beginning of the response body. A short body is read to its end to reuse the connection."""
    body = b""
    for chunk in answer.iter_stream():
        body += chunk[: _RESPONSE_BYTES + 1 - len(body)]
        if len(body) > _RESPONSE_BYTES:
            break
    text = body[:_RESPONSE_BYTES].decode("utf-8", "replace")
    return "".join(c if c.isprintable() else " " for c in text).strip() or None
