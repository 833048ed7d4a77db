"""How many tasks go together: fewer after memory ran out, more again after it did not."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from inferq.consumers.worker.batch_limit import BatchLimit


def test_memory_that_runs_out_halves_the_batch_and_good_batches_double_it_again() -> None:
    limit = BatchLimit()
    assert limit.within(32) == 32
    limit.shrink(32)
    assert limit.within(32) == 16
    limit.shrink(16)
    assert limit.within(32) == 8
    for _ in range(15):
        limit.worked(8)
    limit.worked(3)
    assert limit.within(32) == 8, "a smaller batch proves nothing"
    limit.worked(8)
    assert limit.within(32) == 16
    for _ in range(16):
        limit.worked(16)
    assert limit.within(32) == 32


def test_one_task_at_a_time_grows_as_well() -> None:
    limit = BatchLimit()
    limit.shrink(2)
    limit.shrink(limit.within(4))
    assert limit.within(4) == 1
    for _ in range(16):
        limit.worked(1)
    assert limit.within(4) == 2


@given(
    most=st.integers(1, 300),
    steps=st.lists(st.sampled_from(["out of memory", "worked", "smaller"]), max_size=200),
)
def test_it_stays_between_one_and_what_the_engine_takes(most: int, steps: list[str]) -> None:
    limit = BatchLimit()
    for step in steps:
        before = limit.within(most)
        if step == "out of memory":
            limit.shrink(before)
            assert limit.within(most) == max(1, before // 2)
        else:
            limit.worked(before if step == "worked" else before - 1)
            assert limit.within(most) in {before, min(2 * before, most)}
        assert 1 <= limit.within(most) <= most
