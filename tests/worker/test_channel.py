"""The channel to an engine process: whole messages only, and a deadline for each call."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator

import pytest

from inferq.consumers.runtime.channel import LARGEST_BYTES, Channel, Unreadable


@pytest.fixture
def ends() -> Iterator[tuple[Channel, socket.socket]]:
    near, far = socket.socketpair()
    channel = Channel(near)
    yield channel, far
    channel.close()
    far.close()


def test_a_message_exists_once_all_of_it_is_here(ends: tuple[Channel, socket.socket]) -> None:
    channel, far = ends
    for byte in struct.pack(">I", 3) + b"ab":
        far.sendall(bytes([byte]))
        assert not channel.poll()
    with pytest.raises(TimeoutError):
        channel.receive(0.05)
    far.sendall(b"c" + struct.pack(">I", 0))
    assert (channel.receive(0), channel.receive(0)) == (b"abc", b"")
    far.sendall(struct.pack(">I", 3) + b"ab")
    far.close()
    assert channel.poll()
    with pytest.raises(EOFError):
        channel.receive(0)


def test_a_message_beyond_every_size_is_refused_at_once(ends: tuple[Channel, socket.socket]) -> None:
    channel, far = ends
    far.sendall(struct.pack(">I", LARGEST_BYTES + 1))
    with pytest.raises(Unreadable, match="limit"):
        channel.receive(5)


def test_a_reader_that_does_not_read_holds_a_sender_only_for_its_time(
    ends: tuple[Channel, socket.socket],
) -> None:
    channel, _far = ends
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        channel.send(bytes(LARGEST_BYTES), 0.1)
    assert 0.1 <= time.monotonic() - began < 5
    with pytest.raises(OSError, match=r"[Pp]ipe"):  # the rest would be taken for another message
        channel.send(b"next", 0.1)


def test_two_channels_understand_each_other() -> None:
    near, far = (Channel(end) for end in socket.socketpair())
    near.send(b"question" * 1000, 1)
    assert far.receive(1) == b"question" * 1000
    near.close()
    with pytest.raises(EOFError):
        far.receive(1)
    far.close()
