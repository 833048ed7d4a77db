"""A form with one file (RFC 7578), parsed as a stream: the file is never held in memory or on disk."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from inferq.producer.gateway.problems import ProblemError


class FormFile:
    """The one file of a form; other fields are ignored.

    `begin` reads up to the file and sets `filename` and `content_type`. `content` yields the file's bytes and
    reads the form to its end. Both raise ProblemError: 400 for a malformed form, 422 unless it has exactly one
    file, 413 if the file has more than `limit` bytes.
    """

    def __init__(self, stream: AsyncIterator[bytes], boundary: bytes, *, limit: int) -> None:
        self.filename = ""
        self.content_type = ""
        self._stream = stream
        self._limit = limit
        self._bytes = 0
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
            raise _malformed("its Content-Type has no boundary")

    async def begin(self) -> None:
        while not self._files:
            if not await self._feed():
                raise ProblemError(422, "no_file", "the form has no file; give one part a filename")

    async def content(self) -> AsyncIterator[bytes]:
        while True:
            while self._ready:
                yield self._ready.popleft()
            if not await self._feed():
                return

    async def _feed(self) -> bool:
        """Parse the next chunk; False at the end."""
        chunk = await anext(self._stream, None)
        if chunk is None:
            if not self._complete:
                raise _malformed("it ends before its closing boundary")
            return False
        try:
            self._parser.write(chunk)
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
            raise ProblemError(
                422, "several_files", "the form has more than one file; send one file per request"
            )
        self._in_file = True
        self.filename = options[b"filename"].decode("utf-8", "replace")
        self.content_type = self._headers.get(b"content-type", b"").decode("latin-1")

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if not self._in_file:
            return
        self._bytes += end - start
        if self._bytes > self._limit:
            raise ProblemError(413, "too_large", f"the file is larger than the limit of {self._limit} bytes")
        self._ready.append(data[start:end])

    def _form_ends(self) -> None:
        self._complete = True


def _malformed(detail: str) -> ProblemError:
    return ProblemError(400, "bad_form", f"the form is malformed: {detail}")
