"""A form with one file (RFC 7578), taken apart as it comes in: no part of it waits on disk or in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from inferq.producer.gateway.problems import Refused


class FormFile:
    """The one file of a form. Fields beside it are passed over.

    `begin` reads on to the file, whose `filename` and `content_type` stand then; `content` gives its bytes
    and reads the form to its end. Both raise Refused: 400 for a malformed form, 422 unless there is exactly
    one file, 413 for one of more than `limit` bytes.
    """

    def __init__(self, stream: AsyncIterator[bytes], boundary: bytes, *, limit: int) -> None:
        self.filename = ""
        self.content_type = ""
        self._stream = stream
        self._limit = limit
        self._taken = 0
        self._files = 0
        self._in_file = False
        self._complete = False
        self._name = b""
        self._value = b""
        self._headers: dict[bytes, bytes] = {}
        self._ready: deque[bytes] = deque()
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._part_begins,
                    "on_header_field": self._header_name,
                    "on_header_value": self._header_value,
                    "on_header_end": self._header_ends,
                    "on_headers_finished": self._headers_end,
                    "on_part_data": self._part_data,
                    "on_end": self._form_ends,
                },
            )
        except FormParserError as error:
            raise _malformed(str(error)) from error
        if not boundary:
            raise _malformed("its Content-Type names no boundary")

    async def begin(self) -> None:
        while not self._files:
            if not await self._feed():
                raise Refused(422, "no_file", "the form holds no file: give a part a filename")

    async def content(self) -> AsyncIterator[bytes]:
        while True:
            while self._ready:
                yield self._ready.popleft()
            if not await self._feed():
                return

    async def _feed(self) -> bool:
        """Read one piece more; False at the end."""
        piece = await anext(self._stream, None)
        if piece is None:
            if not self._complete:
                raise _malformed("it ends before its closing boundary")
            return False
        try:
            self._parser.write(piece)
        except FormParserError as error:
            raise _malformed(str(error)) from error
        return True

    def _part_begins(self) -> None:
        self._headers = {}
        self._name = self._value = b""
        self._in_file = False

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_ends(self) -> None:
        self._headers[self._name.lower()] = self._value
        self._name = self._value = b""

    def _headers_end(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        if b"filename" not in options:
            return
        self._files += 1
        if self._files > 1:
            raise Refused(422, "several_files", "the form holds more than one file: send them one by one")
        self._in_file = True
        self.filename = options[b"filename"].decode("utf-8", "replace")
        self.content_type = self._headers.get(b"content-type", b"").decode("latin-1")

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if not self._in_file:
            return
        self._taken += end - start
        if self._taken > self._limit:
            raise Refused(413, "too_large", f"the file has more than {self._limit} bytes, which is the limit")
        self._ready.append(data[start:end])

    def _form_ends(self) -> None:
        self._complete = True


def _malformed(what: str) -> Refused:
    return Refused(400, "bad_form", f"the form cannot be read: {what}")
