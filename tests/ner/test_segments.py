"""Texts are cut into pieces that a model can take."""

from __future__ import annotations

import time
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferq.consumers.ner.folding import fold, has_visible_text
from inferq.consumers.ner.segments import segments

ANYTHING = st.text(
    st.one_of(
        st.sampled_from("张北京。！？；，、：”’）\n\r\u2028 \u3000a1é😀\u0301\u200d\0\ufeff…"),
        st.characters(),
        st.characters(categories=["Cs"]),
    ),
    max_size=200,
)


def pieces(text: str, window: int = 512) -> list[str]:
    return [text[start:end] for start, end in segments(text, window)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("张伟来了。李娜走了！谁？", ["张伟来了。", "李娜走了！", "谁？"]),
        ("他说：“来！”她走了。", ["他说：“来！”", "她走了。"]),
        ("怎么……好吧。", ["怎么……", "好吧。"]),
        ("没有句号", ["没有句号"]),
        ("一\n\n二\r\n三\u2028四", ["一", "二", "三", "四"]),
        ("  前后\u3000\n", ["前后"]),
        ("\r\n \n", []),
        ("", []),
        ("3.14是圆周率。", ["3.14是圆周率。"]),
    ],
)
def test_sentences_are_pieces_of_their_own(text: str, expected: list[str]) -> None:
    assert pieces(text) == expected


@pytest.mark.parametrize(
    ("text", "window", "expected"),
    [
        ("一二三四五；七八九，十一", 10, ["一二三四五；", "七八九，十一"]),
        ("一二三四五，七八九、十一", 10, ["一二三四五，", "七八九、十一"]),
        ("一二三四五六、八九十一二", 10, ["一二三四五六、", "八九十一二"]),
        ("一二三四五六 八九十一二", 10, ["一二三四五六", "八九十一二"]),
        ("一二三四五六七abcdef", 10, ["一二三四五六七", "abcdef"]),
        ("一，三四五六七八九十一二", 10, ["一，三四五六七八九十", "一二"]),
        ("一二三四五六七八九e\u0301十", 10, ["一二三四五六七八九", "e\u0301十"]),
        ("abcdefghijklmnop", 10, ["abcdefghij", "klmnop"]),
    ],
)
def test_a_sentence_that_is_too_long_is_cut_at_the_best_place(
    text: str, window: int, expected: list[str]
) -> None:
    assert pieces(text, window) == expected


@given(ANYTHING, st.integers(1, 30))
def test_pieces_cover_all_but_white_space_in_order(text: str, window: int) -> None:
    end = 0
    for start, piece_end in segments(text, window):
        assert not text[end:start].strip()
        assert 0 < piece_end - start <= window
        assert text[start:piece_end] == text[start:piece_end].strip()
        end = piece_end
    assert not text[end:].strip()


@given(st.lists(st.sampled_from(["张", "e\u0301", "😀\u200d😀", "ก็"]), max_size=80), st.integers(8, 30))
def test_no_mark_is_torn_from_its_letter(letters: list[str], window: int) -> None:
    found = pieces("".join(letters), window)
    assert "".join(found) == "".join(letters)
    assert not [p for p in found if p[0] == "\u200d" or unicodedata.category(p[0]).startswith("M")]


@pytest.mark.parametrize("unit", ["a", "。", "，", " ", "\n", "张", "e\u0301", "”", "a ", "\u200d"])
def test_a_long_text_is_cut_in_linear_time(unit: str) -> None:
    text = unit * (100_000 // len(unit))
    began = time.monotonic()
    assert sum(len(piece) for piece in pieces(text)) <= len(text)
    assert time.monotonic() - began < 60


@given(ANYTHING)
def test_folding_keeps_every_offset(text: str) -> None:
    assert len(fold(text)) == len(text)
    assert fold(fold(text)) == fold(text)


def test_folding_maps_full_width_to_half_width() -> None:
    assert fold("（１２，ＡＢ。）“”：；？！～") == '(12,AB.)"":;?!~'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", False),
        (" \t\r\n\u3000", False),
        ("\ufeff\0\u200b", False),
        ("。", True),
        (" 张 ", True),
        ("😀", True),
    ],
)
def test_what_has_visible_text(text: str, expected: bool) -> None:
    assert has_visible_text(text) is expected
