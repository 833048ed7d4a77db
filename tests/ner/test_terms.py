"""The user's own terms are found wherever they stand."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferq.consumers.engine import TaskAborted
from inferq.consumers.ner.terms import Dictionary


def found(terms: dict[str, list[str]], text: str) -> list[tuple[str, str]]:
    spans = Dictionary(terms).find(text)
    assert all(span.source == "dictionary" and span.label is None for span in spans)
    return [(span.type, text[span.start : span.end]) for span in spans]


def test_the_longest_match_holds() -> None:
    terms = {"DISEASE": ["糖尿病", "2型糖尿病"], "DRUG": ["糖"]}
    assert found(terms, "2型糖尿病与糖尿病，少吃糖") == [
        ("DISEASE", "2型糖尿病"),
        ("DISEASE", "糖尿病"),
        ("DRUG", "糖"),
    ]
    assert found({"A": ["甲乙"], "B": ["乙丙丁"]}, "甲乙丙丁") == [("B", "乙丙丁")]
    assert found({"A": ["甲乙", "乙丙"]}, "甲乙丙") == [("A", "甲乙")]
    assert found({"A": ["甲"]}, "甲甲") == [("A", "甲"), ("A", "甲")]


def test_width_does_not_matter_and_case_does() -> None:
    assert found({"A": ["COVID-19"]}, "ＣＯＶＩＤ－１９与COVID-19") == [
        ("A", "ＣＯＶＩＤ－１９"),
        ("A", "COVID-19"),
    ]
    assert found({"A": ["（甲）"]}, "(甲)") == [("A", "(甲)")]
    assert found({"A": ["IT"]}, "it") == []


def test_latin_terms_are_whole_words() -> None:
    assert found({"A": ["IT", "B12"]}, "IT，UNITED，B12，B123，维生素B12片，的IT业") == [
        ("A", "IT"),
        ("A", "B12"),
        ("A", "B12"),
        ("A", "IT"),
    ]


def test_nothing_is_found_without_terms() -> None:
    assert found({}, "甲") == []
    assert found({"A": []}, "甲") == []


def test_a_hostile_dictionary_costs_seconds_at_most() -> None:
    terms = {"A": ["甲" * length + "乙" for length in range(1, 64)] + ["甲" * 64]}
    began = time.monotonic()
    assert len(found(terms, "甲" * 100_000)) == 100_000 // 64
    assert time.monotonic() - began < 120


def test_a_search_can_be_stopped() -> None:
    asked: list[None] = []

    def stop() -> None:
        asked.append(None)
        if len(asked) == 3:
            raise TaskAborted

    with pytest.raises(TaskAborted):
        Dictionary({"A": ["甲" * length for length in range(1, 60)]}).find("乙" * 100_000, stop)


@given(
    st.dictionaries(
        st.sampled_from(["A", "B"]), st.lists(st.text("甲乙", min_size=1, max_size=4)), max_size=2
    ),
    st.text("甲乙丙", max_size=30),
)
def test_matches_are_terms_and_none_is_left_out(terms: dict[str, list[str]], text: str) -> None:
    spans = Dictionary(terms).find(text)
    known = {term for group in terms.values() for term in group}
    taken = [False] * len(text)
    end = 0
    for span in spans:
        assert text[span.start : span.end] in known
        assert span.start >= end
        end = span.end
        taken[span.start : span.end] = [True] * (span.end - span.start)
    for start in range(len(text)):
        for stop in range(start + 1, len(text) + 1):
            if text[start:stop] in known:
                overlapping = [s for s in spans if s.start < stop and s.end > start]
                assert overlapping
                assert max(s.end - s.start for s in overlapping) >= stop - start


@pytest.mark.parametrize(
    ("term", "text", "count"),
    [
        ("t", "l'été, t", 1),
        ("Art", "Artémis, Art", 1),
        ("Москва", "Москваград, новая Москва", 1),
        ("Stra", "Straße, Stra", 1),
        ("caf", "cafe\u0301 cafe, caf", 1),
        ("e", "caf e\u0301, e", 1),
        ("Αθήνα", "Αθήνας, Αθήνα", 1),
        ("서울", "서울에서", 1),
        ("กรุงเทพ", "ในกรุงเทพมหานคร", 1),
        ("東京", "東京タワー", 1),
    ],
)
def test_terms_are_whole_words_where_words_have_spaces_between_them(term: str, text: str, count: int) -> None:
    assert found({"A": [term]}, text) == [("A", term)] * count
