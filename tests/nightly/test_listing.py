"""What is new in a listing against the one before."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferq.consumers.nightly.listing import Seen, with_news
from inferq.storage.batches.lines import SourceUnusable

listings = st.dictionaries(st.text(max_size=3), st.sampled_from("abc"), max_size=30)


def ordered(listing: dict[str, str]) -> list[Seen]:
    return sorted(Seen(key, etag) for key, etag in listing.items())


@given(listings, listings)
def test_new_is_what_has_another_key_or_etag(before: dict[str, str], now: dict[str, str]) -> None:
    found = list(with_news(ordered(now), ordered(before)))
    assert [seen for seen, _ in found] == ordered(now)
    assert {seen.key for seen, new in found if new} == {k for k, etag in now.items() if before.get(k) != etag}


def test_a_listing_out_of_order_is_refused_rather_than_taken_for_news() -> None:
    with pytest.raises(SourceUnusable, match="only_new = false"):
        list(with_news([Seen("b", "1"), Seen("a", "1")], []))
