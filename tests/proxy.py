"""A TCP proxy that tests put between a client and its server, to cut, delay and half-close the line."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress


class TcpProxy:
    """Forwards a free loopback port to `target_port`; `cut` breaks all connections, `refuse` further ones."""

    def __init__(self, target_port: int) -> None:
        self._target = ("127.0.0.1", target_port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._open: set[socket.socket] = set()
        self._far: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._refusing = False
        self._delay = 0.0
        self._towards_server = threading.Event()
        self._towards_server.set()
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Break every connection at once, in the middle of whatever is on it."""
        with self._lock:
            for line in self._open:
                with suppress(OSError):
                    line.shutdown(socket.SHUT_RDWR)

    def half_close(self, *, towards_server: bool) -> None:
        """End one direction of every connection: that end hears no more, the other one still may."""
        with self._lock:
            for line in self._open:
                if (line in self._far) is towards_server:
                    with suppress(OSError):
                        line.shutdown(socket.SHUT_WR)

    def delay(self, seconds: float) -> None:
        """Hold whatever comes for that long before it goes on, in order; 0 ends it."""
        self._delay = seconds

    def hold(self, holding: bool = True) -> None:
        """Let nothing pass towards the server, until told otherwise; the other direction goes on."""
        if holding:
            self._towards_server.clear()
        else:
            self._towards_server.set()

    def refuse(self, refusing: bool = True) -> None:
        """Close new connections as they come, until told otherwise."""
        self._refusing = refusing
        if refusing:
            self.cut()

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._towards_server.set()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self._refusing:
                near.close()
                continue
            try:
                far = socket.create_connection(self._target, timeout=60)
            except OSError:
                near.close()
                continue
            far.settimeout(None)
            with self._lock:
                self._open |= {near, far}
                self._far.add(far)
            for one, other in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(one, other), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if self._delay:
                    time.sleep(self._delay)
                if sink in self._far:
                    self._towards_server.wait()
                sink.sendall(data)
        for line in (source, sink):
            with suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)
        with self._lock:
            self._open.discard(source)
            self._far.discard(source)
        source.close()
