"""A RabbitMQ connection on its own thread. It reconnects with backoff until it is closed."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import pika
import pika.data as pika_data  # type: ignore[import-untyped]
from pika.adapters.select_connection import IOLoop
from pika.adapters.utils.connection_workflow import AMQPConnectorException
from pika.channel import Channel
from pika.exceptions import (
    AMQPConnectionError,
    ChannelClosedByBroker,
    ConnectionClosedByBroker,
    ConnectionClosedByClient,
    ProbableAccessDeniedError,
    ProbableAuthenticationError,
)

from inferq.broker.errors import BrokerUnavailable
from inferq.broker.retry import backoff
from inferq.broker.settings import BrokerSettings
from inferq.broker.topology import ACCESS_REFUSED, MAY_NOT_DECLARE, Topology, mismatch
from inferq.schemas import InferqError

_log = logging.getLogger(__name__)

# This module logs each lost connection in one line; pika would add a stack trace.
logging.getLogger("pika").setLevel(logging.CRITICAL)

_decode_value: Callable[[bytes, int], tuple[Any, int]] = pika_data.decode_value
_decode_table: Callable[[bytes, int], tuple[dict[str, Any], int]] = pika_data.decode_table


def _decode_leniently(encoded: bytes, offset: int) -> tuple[Any, int]:
    """Decode a header's value. An invalid timestamp, such as one in milliseconds, becomes a number.

    pika raises while it reads the frame and so loses the connection: one bad message would block its queue, and
    later the dead letters.
    """
    try:
        return _decode_value(encoded, offset)
    except (ValueError, OverflowError, OSError):
        if encoded[offset : offset + 1] != b"T":
            raise
        return int.from_bytes(encoded[offset + 1 : offset + 9], "big"), offset + 9


def _decode_table_leniently(encoded: bytes, offset: int) -> tuple[dict[str, Any], int]:
    """Decode a table, such as a message's headers. A table that pika cannot read, such as one nested too deeply,
    becomes empty.

    RabbitMQ does not limit the depth, and pika would lose the connection as above. The message is then judged by
    its body alone.
    """
    end = offset + 4 + int.from_bytes(encoded[offset : offset + 4], "big")
    try:
        return _decode_table(encoded, offset)
    except Exception:
        return {}, end


pika_data.decode_value = _decode_leniently
pika_data.decode_table = _decode_table_leniently

_TICK_SECONDS = 0.2
"""Seconds between two calls of `_idle`."""

_LOAN_SECONDS = 0.1
"""Seconds that a borrowed loop may stand still before the connection's own thread takes it back."""

_RECONNECT_CAP = 3.0
"""The longest pause between attempts, in seconds: workers should return soon after the broker."""

_REFUSED_WAIT = 10.0
"""Seconds between attempts while the broker refuses the connection, as for wrong credentials."""


def _nothing() -> None:
    """Only wakes the loop."""


class FrameConnection(pika.SelectConnection):
    """A connection that also sends frames encoded in advance."""

    @property
    def largest_payload(self) -> int:
        """The largest body of one frame in bytes, as negotiated with the broker."""
        size: int = self._body_max_length  # type: ignore[attr-defined]
        return size

    def send_frames(self, frames: Sequence[bytes]) -> None:
        if frames:
            self._output_marshaled_frames(frames)

    def _output_marshaled_frames(self, marshaled_frames: Sequence[bytes]) -> None:
        # pika makes one system call per frame, and each wakes the broker; a message has three frames.
        super()._output_marshaled_frames([b"".join(marshaled_frames)])  # type: ignore[misc]


class BrokerThread:
    """Owns one connection with one channel. All AMQP calls and callbacks run on its thread.

    Once the topology is declared, `_opened` gets the channel; `_lost` reports its loss. Several URLs are tried in
    turn.

    A thread that waits for messages may borrow the loop and turn it itself; meanwhile it is "the connection's
    thread". While the borrower is busy, the connection's own thread turns the loop, so heartbeats never wait for a
    task. Without this loan each message costs two switches between threads: in 130 pairs of runs on two cores, echo
    tasks drained 6 % slower, and the worker used 24 % more CPU time.
    """

    def __init__(self, settings: BrokerSettings, *, name: str, topology: Topology | None = None) -> None:
        self.name = name
        self._settings = settings
        self._parameters = itertools.cycle(settings.connections(name))
        self._topology = topology
        self._loop: IOLoop | None = None
        self._connection: FrameConnection | None = None
        self._channel: Channel | None = None
        self._ready = threading.Event()
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._loan = threading.Condition()
        self._asked = 0  # the thread that wants the loop; 0: none
        self._lent = 0  # the thread that has the loop; 0: the connection's own
        self._turning = False  # it is turning the loop now
        self._turned = False  # it has turned the loop since the last check
        self._ended = False
        self._error: Exception | None = None
        self._failures = 0
        self._refused = False
        self._only_check = False  # the user may not declare
        self.last_error: InferqError | None = None
        self.blocked_reason: str | None = None
        self._thread = threading.Thread(target=self._run, name=f"amqp {name}", daemon=True)

    # For other threads.

    def start(self) -> None:
        """Start connecting in the background."""
        self._thread.start()

    @property
    def connected(self) -> bool:
        """Whether the channel is open and the topology declared."""
        return self._ready.is_set()

    def wait_connected(self, timeout: float) -> None:
        """Wait until connected. After `timeout` seconds, raises the error that prevents it."""
        if not self._ready.wait(timeout):
            raise self.last_error or BrokerUnavailable(f"RabbitMQ did not answer within {timeout:g} s")

    def close(self, timeout: float = 5.0) -> None:
        """Close the connection and end the thread. Waits up to `timeout` seconds."""
        self._closing.set()
        self._call(self._shut)
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    # On the connection's thread.

    def _opened(self, channel: Channel) -> None:
        raise NotImplementedError

    def _lost(self) -> None:
        """The channel is lost; its deliveries can no longer be acknowledged."""
        raise NotImplementedError

    def _idle(self) -> None:
        """Called a few times a second, connected or not."""

    def _blocked(self) -> None:
        """The broker blocks publishing; `blocked_reason` says why."""

    def _unblocked(self) -> None:
        """The broker accepts publishing again."""

    def _call(self, function: Callable[[], None]) -> bool:
        """Run `function` on the connection's thread. Returns False without a connection."""
        with self._lock:
            if self._loop is None:
                return False
            self._loop.add_callback_threadsafe(function)
        self._take_back()
        return True

    def _borrow(self, timeout: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Borrow the loop for one `_turn`. Returns False if it stayed unavailable for `timeout` seconds.

        Only one thread may borrow at a time. It gives up early once `until` holds: another thread has turned the loop.
        Who makes it hold calls `_notice`.
        """
        me = threading.get_ident()
        with self._loan:
            if self._lent != me:
                self._asked = me
                if self._lent and not self._turning:
                    self._lent = 0
                    self._loan.notify_all()
                loop = self._loop
                if loop is not None and self._ready.is_set():
                    loop.add_callback_threadsafe(_nothing)
                self._loan.wait_for(lambda: self._lent == me or until(), timeout)
                if self._asked == me:
                    self._asked = 0
            if self._lent != me:
                return False
            self._turning = True
            return True

    def _notice(self) -> None:
        """Wake a thread that waits in `_borrow`, so that it looks at its condition."""
        with self._loan:
            self._loan.notify_all()

    def _borrow_again(self) -> bool:
        """Borrow the loop for one `_turn` if it is still lent to this thread."""
        with self._loan:
            if self._lent != threading.get_ident():
                return False
            self._turning = True
            return True

    def _turn(self, function: Callable[[], None] = _nothing, *, limit: float = _TICK_SECONDS) -> None:
        """Run `function`, then handle the next traffic, waiting up to `limit` seconds for it."""
        loop = self._loop
        if loop is None:
            raise RuntimeError("only a borrowed loop can be turned")
        try:
            function()
            if limit < _TICK_SECONDS:
                loop.call_later(limit, _nothing)
            loop.poll()
            loop.process_timeouts()
        except Exception as error:
            self._error, self._ended = error, True
        with self._loan:
            self._turning, self._turned = False, True
            if self._ended or self._asked:
                self._lent = 0
                self._loan.notify_all()

    def _take_back(self) -> None:
        """End an idle loan because the connection has work to do."""
        with self._loan:
            if self._lent and not self._turning:
                self._lent = 0
                self._loan.notify_all()

    def _later(self, seconds: float, function: Callable[[], None]) -> None:
        """Run `function` after `seconds`. Call this only on the connection's thread."""
        if self._loop is not None:
            self._loop.call_later(seconds, function)

    def _run(self) -> None:
        while not self._closing.is_set():
            self._connect_once()
            if self._closing.is_set():
                break
            self._failures += 1
            wait = _REFUSED_WAIT if self._refused else backoff(self._failures, cap=_RECONNECT_CAP)
            level = logging.ERROR if self._refused else logging.WARNING
            _log.log(level, "%s: %s; next attempt in %.1f s", self.name, self.last_error, wait)
            while wait > 0 and not self._closing.wait(min(wait, 0.2)):
                wait -= 0.2
                self._idle()
        self._idle()

    def _connect_once(self) -> None:
        """Connect once and run until the connection ends."""
        self._refused = False
        self._ended, self._error = False, None
        parameters = next(self._parameters)
        where = f"RabbitMQ at {parameters.host}:{parameters.port}"
        try:
            loop = IOLoop()
        except OSError as error:  # for example, no free file descriptor
            self.last_error = BrokerUnavailable(f"{where} cannot be reached: {error}")
            return
        with self._lock:
            self._loop = loop
        try:
            self._connection = FrameConnection(
                parameters,
                on_open_callback=self._connection_open,
                on_open_error_callback=lambda _c, error: self._failed(where, error),
                on_close_callback=lambda _c, error: self._failed(where, error),
                custom_ioloop=loop,
            )
            self._connection.add_on_connection_blocked_callback(self._connection_blocked)
            self._connection.add_on_connection_unblocked_callback(self._connection_unblocked)
            self._tick(loop)
            if not self._closing.is_set():
                self._drive(loop)
        except Exception as error:
            # No error may end this thread: reconnect.
            _log.exception("%s: internal error on the connection's thread", self.name)
            self.last_error = BrokerUnavailable(f"{where}: {error}")
        finally:
            with self._lock:
                self._loop = None
            self._ready.clear()
            if self._channel is not None:
                self._channel = None
                self._lost()
            self._connection = None
            self.blocked_reason = None
            with suppress(Exception):
                loop.close()

    def _drive(self, loop: IOLoop) -> None:
        """Turn the loop, or lend it, until the connection ends."""
        loop.activate_poller()
        try:
            while not self._ended:
                with self._loan:
                    if self._asked and self._ready.is_set():
                        self._lent, self._asked, self._turned = self._asked, 0, True
                        self._loan.notify_all()
                    while self._lent:
                        self._turned = False
                        self._loan.wait(_LOAN_SECONDS)
                        if not self._turning and not self._turned:
                            self._lent = 0
                if not self._ended:
                    loop.poll()
                    loop.process_timeouts()
        finally:
            loop.deactivate_poller()
        if self._error is not None:
            raise self._error

    def _tick(self, loop: IOLoop) -> None:
        if self._closing.is_set() and self._connection is not None and self._connection.is_closed:
            self._ended = True
            return
        self._idle()
        loop.call_later(_TICK_SECONDS, lambda: self._tick(loop))

    def _connection_open(self, connection: pika.connection.Connection) -> None:
        connection.channel(on_open_callback=self._channel_open)

    def _channel_open(self, channel: Channel) -> None:
        channel.add_on_close_callback(self._channel_closed)
        if self._topology is None:
            self._channel_ready(channel)
        else:
            self._topology.declare(channel, lambda: self._channel_ready(channel), only_check=self._only_check)

    def _channel_ready(self, channel: Channel) -> None:
        self._channel = channel
        self._failures = 0
        self.last_error = None
        self._opened(channel)
        self._ready.set()
        _log.info("%s: connected", self.name)

    def _channel_closed(self, channel: Channel, reason: Exception) -> None:
        if self._closing.is_set() or self._connection is None or not self._connection.is_open:
            return
        # A closed channel closes the connection, too, so there is only one way to recover.
        if isinstance(reason, ChannelClosedByBroker):
            declaring = channel is not self._channel
            inequivalent = reason.reply_code == 406 and "inequivalent arg" in reason.reply_text
            if declaring and reason.reply_code == ACCESS_REFUSED and not self._only_check:
                # Another user, with the right to declare, may have declared everything already.
                self._only_check = True
                self.last_error = BrokerUnavailable(
                    f"{reason.reply_text}: this broker user may not declare; checking what exists"
                )
            elif declaring and reason.reply_code == 404 and self._only_check:
                self._refused, self._only_check = True, False
                self.last_error = BrokerUnavailable(f"{reason.reply_text}; {MAY_NOT_DECLARE}")
            elif inequivalent or (declaring and reason.reply_code == 404):
                self._refused = True
                self.last_error = mismatch(reason)
            else:
                self.last_error = BrokerUnavailable(f"RabbitMQ closed the channel: {reason.reply_text}")
        else:
            self.last_error = BrokerUnavailable(f"the channel was closed: {_reason(reason)}")
        self._connection.close(320, "channel closed")

    def _failed(self, where: str, error: BaseException | str) -> None:
        if isinstance(error, ProbableAuthenticationError) or (
            isinstance(error, ConnectionClosedByBroker) and error.reply_code == 403
        ):
            self._refused = True
            self.last_error = BrokerUnavailable(
                f"{where} refuses the user name or password; check INFERQ_AMQP_URL"
            )
        elif isinstance(error, ProbableAccessDeniedError) or (
            isinstance(error, ConnectionClosedByBroker) and error.reply_code == 530
        ):
            self._refused = True
            self.last_error = BrokerUnavailable(
                f"{where} refuses the virtual host: {error}; check INFERQ_AMQP_URL and the user's permissions"
            )
        elif not isinstance(error, ConnectionClosedByClient):
            self.last_error = BrokerUnavailable(f"{where} cannot be reached: {_reason(error)}")
        elif self.last_error is None:
            self.last_error = BrokerUnavailable(f"the connection to {where} was closed: {_reason(error)}")
        self._ended = True

    def _shut(self) -> None:
        connection = self._connection
        if connection is not None and not connection.is_closing and not connection.is_closed:
            connection.close()  # also while it is still opening

    def _connection_blocked(self, _connection: object, frame: pika.frame.Method[Any]) -> None:
        self.blocked_reason = str(frame.method.reason or "an alarm")
        _log.warning("%s: RabbitMQ has blocked publishing: %s", self.name, self.blocked_reason)
        self._blocked()

    def _connection_unblocked(self, _connection: object, _frame: object) -> None:
        self.blocked_reason = None
        _log.info("%s: RabbitMQ accepts publishing again", self.name)
        self._unblocked()


def _reason(error: BaseException | str) -> str:
    """The innermost cause that pika reports; the outer ones say nothing useful."""
    if isinstance(error, AMQPConnectionError) and error.args and isinstance(error.args[0], BaseException):
        return _reason(error.args[0])
    for inner in (getattr(error, "exception", None), *reversed(getattr(error, "exceptions", ()))):
        if isinstance(inner, BaseException):
            return _reason(inner)
    return str(error) or type(error).__name__


def connect(settings: BrokerSettings, *, name: str) -> pika.BlockingConnection:
    """A blocking connection for a short command. Raises BrokerUnavailable.

    If an alarm blocks publishing for INFERQ_AMQP_BLOCKED_LIMIT seconds, pika raises ConnectionBlockedTimeout.
    """
    parameters = settings.connections(name)
    for node in parameters:
        node.blocked_connection_timeout = settings.amqp_blocked_limit
    where = " or ".join(f"{p.host}:{p.port}" for p in parameters)
    try:
        return pika.BlockingConnection(parameters)
    except (ProbableAuthenticationError, ProbableAccessDeniedError) as error:
        raise BrokerUnavailable(
            f"RabbitMQ at {where} refuses the user, password or virtual host; check INFERQ_AMQP_URL"
        ) from error
    except (AMQPConnectionError, AMQPConnectorException, OSError) as error:
        # AMQPConnectorException: it accepts the connection, and then does not answer.
        raise BrokerUnavailable(f"RabbitMQ at {where} cannot be reached: {_reason(error)}") from error
