"""What the model gets to see of a text, and where that is in the text."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferq.consumers.ner.backend import Span
from inferq.consumers.ner.reading import iso_dates, reading


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("<p>张伟在<b>北京</b>大学读书。</p>", "\n张伟在北京大学读书。\n"),
        ('<DIV class="p">张伟<br/>李娜</DIV>', "\n张伟\n李娜\n"),
        ("甲<!-- 张伟 -->乙<script>var 北京;</script>丙", "甲乙\n丙"),
        ("他读了<红楼梦>，3 < 5 > 2，<b，<Hamlet>", "他读了<红楼梦>，3 < 5 > 2，<b，<Hamlet>"),
        ("李小明今天上午在北京大学第一医\n院接受了手术。", "李小明今天上午在北京大学第一医院接受了手术。"),
        ("李小明今天上午在北京大学第一医\r\n院接受了手术。", "李小明今天上午在北京大学第一医院接受了手术。"),
        ("张伟\n李娜\n王芳", "张伟\n李娜\n王芳"),
        ("第一行在这里结束了。\n第二行开始", "第一行在这里结束了。\n第二行开始"),
        ("这一行的文字是完整的段落\n\n另一个段落", "这一行的文字是完整的段落\n\n另一个段落"),
        ("这一行的文字是完整的段落\n　　另一个段落", "这一行的文字是完整的段落\n　　另一个段落"),
        ("a sentence of Latin words\nthat goes on", "a sentence of Latin words\nthat goes on"),
        ("标题只有八个字长\n这里的文字比上面的长得多而且", "标题只有八个字长\n这里的文字比上面的长得多而且"),
    ],
)  # fmt: skip
def test_markup_and_line_ends_within_a_sentence_are_left_out(text: str, seen: str) -> None:
    assert reading(text).text == seen


@given(st.text(alphabet="张伟北京大学院 \n\r<>/bp=\"'", max_size=80))
def test_each_character_has_its_place(text: str) -> None:
    read = reading(text)
    assert len(read.text) == len(read.places)
    assert list(read.places) == sorted(set(read.places))
    for character, place in zip(read.text, read.places, strict=True):
        assert text[place] == character or (character == "\n" and text[place] == "<")


def test_a_span_is_that_of_the_original_text() -> None:
    text = "<p>张伟在<b>北京</b>大学"
    span = reading(text).original(Span(4, 8, "ORG"))
    assert text[span.start : span.end] == "北京</b>大学"


def test_many_brackets_cost_no_more_than_seconds() -> None:
    began = time.process_time()
    assert reading("<p " * 30_000 + "<!--" * 10_000 + "<script>" * 5_000).text
    assert time.process_time() - began < 10


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("会议于2023-05-01举行", ["2023-05-01"]),
        ("2023-05-01T10:30:00Z，2023-05-01 10:30", ["2023-05-01T10:30:00Z", "2023-05-01 10:30"]),
        ("2023-05-01T10:30:00.123+08:00", ["2023-05-01T10:30:00.123+08:00"]),
        ("2023-13-01，2023-02-30，12023-05-01，2023-05-011，a-2023-05-01", []),
        ("ISO 8601-2023，010-1234-5678", []),
    ],
)
def test_iso_dates_are_times(text: str, found: list[str]) -> None:
    assert [text[span.start : span.end] for span in iso_dates(text)] == found
