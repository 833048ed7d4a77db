"""How long a job rests before it is done, or done again: the arithmetic alone."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from inferq.broker import delayed, job_message
from inferq.broker.topology import DELAY_LEVELS, delay_level
from inferq.consumers.batches.retry import retry_pause

LONGEST = 2**DELAY_LEVELS - 1
JOB = job_message("test.job", "inference.batches", {}, job_id="job")


@given(st.floats(min_value=-10, max_value=2 * LONGEST))
def test_a_delayed_job_rests_at_each_level_whose_bit_is_set_and_enters_at_the_first_of_them(
    seconds: float,
) -> None:
    sent = delayed(JOB, seconds)
    *bits, key = sent.routing_key.split(".", DELAY_LEVELS)
    levels = [level for level, bit in zip(reversed(range(DELAY_LEVELS)), bits, strict=True) if bit == "1"]
    rests = sum(2**level for level in levels)
    assert min(max(seconds, 1), LONGEST) <= rests < max(seconds, 1) + 1
    assert sent.exchange == delay_level(levels[0])
    assert (key, sent.body) == (JOB.routing_key, JOB.body)


@given(
    failures=st.integers(0, 10**9),
    first=st.floats(0.01, 100),
    most=st.floats(0.01, 10_000),
)
def test_a_pause_doubles_up_to_its_limit_and_is_never_nothing(
    failures: int, first: float, most: float
) -> None:
    pause = retry_pause(failures, first, most)
    full = min(most, first * 2 ** min(failures, 10))
    assert 0 < 0.8 * full <= pause <= full
