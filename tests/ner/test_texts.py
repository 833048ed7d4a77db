"""What is no text is refused, early and with a reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inferq.consumers.engine import Context
from inferq.consumers.ner import NerOutput
from inferq.consumers.ner.engine import NerEngine
from inferq.consumers.ner.lac import LacBackend
from inferq.consumers.ner.settings import NerSettings
from inferq.consumers.ner.texts import read_text
from inferq.schemas import InvalidTask
from tests.ner.conftest import ner_task

Read = Callable[..., NerOutput]
CHINESE = "患者张伟因糖尿病入院。" * 20


@pytest.mark.parametrize(
    ("content", "code", "said"),
    [
        (b"", "empty_text", "is empty"),
        (b" \r\n\t\n", "empty_text", "only white space"),
        (b"\xef\xbb\xbf", "empty_text", "only white space"),
        ("\u3000\u200b\n".encode(), "empty_text", "only white space"),
        (CHINESE.encode("gbk"), "not_utf8", "looks like GBK or GB18030.*iconv"),
        (CHINESE.encode("utf-16"), "not_utf8", "is UTF-16, not UTF-8"),
        ("plain".encode("utf-16-le"), "binary_file", "is it UTF-16"),
        ("naïve café".encode("latin-1"), "not_utf8", "byte 2 is 0xef; it looks like Latin-1"),
        ("患者張偉因糖尿病在臺北入院。".encode("big5"), "not_utf8", "looks like Big5.*iconv -f BIG5"),
        ("患者は東京の病院に入院しました。".encode("cp932"), "not_utf8", "looks like Shift-JIS"),
        ("Müller “zitiert” — für".encode("cp1252"), "not_utf8", "Windows-1252"),
        ("Привет, мир".encode("cp1251"), "not_utf8", "convert the file to UTF-8"),
        (CHINESE.encode()[:-1], "not_utf8", "ends in the middle of a character: it is cut off"),
        (CHINESE.encode()[1:], "not_utf8", "its beginning is missing"),
        (b"\xed\xa0\x80\xe5\xbc\xa0", "not_utf8", "not UTF-8"),
        (b"%PDF-1.7\n1 0 obj", "binary_file", "but a PDF"),
        (b"PK\x03\x04" + bytes(40), "binary_file", "Office document"),
        (b"\xd0\xcf\x11\xe0" + bytes(40), "binary_file", "Office document"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "binary_file", "but a picture"),
        (b"\xff\xd8\xff\xe0" + bytes(40), "binary_file", "but a picture"),
        (b"\x1f\x8b\x08" + bytes(40), "binary_file", "gzip"),
        (bytes(3000), "binary_file", "control characters"),
        (bytes(range(256)) * 10, "binary_file", "binary data"),
        (("甲" * 100_001).encode(), "text_too_long", "100001 characters, but a text may have at most 100000"),
        (b"a" * 400_001, "text_too_long", "400001 bytes, but a text may have at most 100000 characters"),
    ],
)
def test_a_file_that_is_no_text_is_refused_for_what_it_is(
    read: Read, content: bytes, code: str, said: str
) -> None:
    with pytest.raises(InvalidTask, match=said) as caught:
        read(content)
    assert caught.value.code == code


def test_a_file_that_is_too_large_is_never_read(tmp_path: Path) -> None:
    path = tmp_path / "huge"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # sparse: to read it would end this process
    with pytest.raises(InvalidTask, match="1099511627776 bytes"):
        read_text(path, 100_000)


def test_longer_texts_may_be_allowed_and_shorter_ones_asked_for(
    lac: LacBackend, make_context: Callable[..., Context], tmp_path: Path
) -> None:
    engine = NerEngine(NerSettings(ner_max_characters=10), backend=lac)
    for fields, name in (({"text": "甲" * 11}, "text"), ({"texts": ["甲", "乙" * 11]}, r"texts\[1\]")):
        with pytest.raises(
            InvalidTask, match=rf"^{name} has 11 characters, but a text may have at most 10"
        ) as caught:
            engine.run(ner_task(**fields), make_context())
        assert caught.value.code == "text_too_long"
    assert engine.run(ner_task(text="甲" * 10), make_context()).texts[0].characters == 10
    engine = NerEngine(NerSettings(ner_max_characters=11), backend=lac)
    (tmp_path / "input").write_text("甲" * 11)
    output = engine.run(ner_task(text_url="data:,x"), make_context(tmp_path / "input"))
    assert output.texts[0].characters == 11


@pytest.mark.parametrize("content", ["\ufeff张伟\r\n", "张\0伟", "a\tb\fc\v\x1b[0m", "\u2028张"])
def test_whatever_is_text_is_kept_character_for_character(tmp_path: Path, content: str) -> None:
    text = content + "甲" * 40
    (tmp_path / "a").write_bytes(text.encode())
    assert read_text(tmp_path / "a", 100) == text


@given(st.binary(max_size=300))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_a_text_or_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "any"
    path.write_bytes(content)
    try:
        text = read_text(path, 1000)
    except InvalidTask as error:
        assert error.code in {"empty_text", "text_too_long", "binary_file", "not_utf8"}
    else:
        assert text.encode() == content
