"""One attempt to deliver a callback: signed over the exact bytes, sent, and what came of it."""

from __future__ import annotations

import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version

import httpcore
from standardwebhooks import Webhook

from inferq.consumers.callbacks.decision import retry_after_seconds
from inferq.consumers.callbacks.settings import CallbackSettings
from inferq.schemas import Callback, CallbackAttempt, InvalidTask
from inferq.schemas.http_url import HttpUrl, parse_http_url
from inferq.storage.fetch.addresses import AddressPolicy, Resolver, system_resolver
from inferq.storage.fetch.pool import HttpPool, header_of

_RESPONSE_BYTES = 1024
_ERROR_CHARACTERS = 300


@dataclass(frozen=True)
class Sent:
    """What came of an attempt. `retry_after`: the seconds that the receiver asked us to stay away.

    `tried`: the receiver had a part in it.
    """

    attempt: CallbackAttempt
    retry_after: float | None = None
    timed_out: bool = False
    tried: bool = True


class Sender:
    """Sends callbacks, from many threads. `resolver` and `ssl_context` stand for the outside world."""

    def __init__(
        self,
        settings: CallbackSettings,
        *,
        resolver: Resolver = system_resolver,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self._timeout = settings.callback_timeout
        policy = AddressPolicy(settings.callback_allowed_networks, setting="INFERQ_CALLBACK_ALLOWED_NETWORKS")
        agent = f"inferq/{version('inferq')}"
        self._pool = HttpPool(
            policy,
            resolver=resolver,
            ssl_context=ssl_context,
            agent=agent,
            patience=self._timeout,  # the deadline of the whole attempt is the one that counts
            connections=None,  # each thread has one at most: waiting for one would be the target's fault
        )

    def send(self, callback: Callback, secrets: Sequence[str]) -> Sent:
        """Make one attempt, signed with each of the secrets, of which there has to be at least one."""
        now = datetime.now(UTC)
        began = time.monotonic()
        status = error = response = retry_after = None
        timed_out = False
        try:
            url = parse_http_url(callback.url)
            with (
                self._pool.deadline(self._timeout),
                self._pool.exchange(
                    "POST", url, _headers(callback, secrets, url, now), callback.body.encode()
                ) as answer,
            ):
                status = answer.status
                retry_after = retry_after_seconds(header_of(answer, b"retry-after"), now)
                response = _beginning(answer)
        except httpcore.TimeoutException:
            timed_out = True
            if status is None:
                error = f"no answer within {self._timeout:g} s"
            else:
                # Whoever never comes to the end of an answer may not have taken it, and holds up the others.
                error = f"status {status}, but the answer did not end within {self._timeout:g} s"
                status = None
        except InvalidTask as refused:
            error = f"{refused.code}: {refused.message}"
        except httpcore.ConnectError as failed:
            cause = failed.__cause__ or failed.__context__
            if isinstance(cause, ssl.SSLCertVerificationError):
                error = f"certificate_refused: the server's certificate does not hold: {cause.verify_message}"
            else:
                error = f"the connection failed: {failed}"
        except (httpcore.NetworkError, httpcore.ProtocolError) as failed:
            error = f"the connection broke off: {failed}"
        attempt = CallbackAttempt(
            at=now,
            seconds=round(time.monotonic() - began, 3),
            status=status,
            error=error[:_ERROR_CHARACTERS] if error is not None else None,
            response=response,
        )
        return Sent(attempt, retry_after, timed_out)


def signatures(callback: Callback, secrets: Sequence[str], moment: datetime) -> str:
    """A signature by each secret, separated by spaces; `moment` is in UTC, and counts in whole seconds."""
    return " ".join(Webhook(secret).sign(callback.callback_id, moment, callback.body) for secret in secrets)


def _headers(callback: Callback, secrets: Sequence[str], url: HttpUrl, now: datetime) -> dict[str, str]:
    headers = {
        "Content-Type": "application/json",
        "Accept-Encoding": "identity",
        "webhook-id": callback.callback_id,
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": signatures(callback, secrets, now),
    }
    if url.credentials:
        headers["Authorization"] = f"Basic {url.credentials.decode()}"
    return headers


def _beginning(answer: httpcore.Response) -> str | None:
    """How the answer's body begins. A short one is read to its end, so that the connection can be kept."""
    body = b""
    for chunk in answer.iter_stream():
        body += chunk[: _RESPONSE_BYTES + 1 - len(body)]
        if len(body) > _RESPONSE_BYTES:
            break
    text = body[:_RESPONSE_BYTES].decode("utf-8", "replace")
    return "".join(c if c.isprintable() else " " for c in text).strip() or None
