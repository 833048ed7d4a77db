"""What every engine has to keep, as tests: hand in a few small tasks of your type, and have them.

    test_contract = engine_contract(Subject(task_type, samples=[Sample({"text": "fine"})]))

With that in a test module, pytest runs each of CHECKS on the engine, which is loaded once, in pytest's own
process. It needs the extra `contract`. The checks are plain functions, for those who use no pytest.
"""

from __future__ import annotations

from collections.abc import Callable

from inferq.consumers.testing.bench import Bench, ContractBroken, Run, Sample, Subject
from inferq.consumers.testing.checks import CHECKS, Check

__all__ = ["CHECKS", "Bench", "Check", "ContractBroken", "Run", "Sample", "Subject", "engine_contract"]


def engine_contract(*subjects: Subject) -> Callable[[Check, Bench], None]:
    """A test function, for a name that begins with `test`: each check on each subject."""
    import pytest

    cases = [
        pytest.param(check, bench, id=f"{bench.subject.task_type.name}-{check.__name__}")
        for bench in map(Bench, subjects)
        for check in CHECKS
    ]

    @pytest.mark.parametrize(("check", "bench"), cases)
    def test_contract(check: Check, bench: Bench) -> None:
        check(bench)

    return test_contract
