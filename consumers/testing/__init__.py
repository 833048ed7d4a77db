"""Tests that every engine must pass, made from a few small tasks of its type.

    test_contract = engine_contract(Subject(task_type, samples=[Sample({"text": "fine"})]))

With this line in a test module, pytest runs each of CHECKS on the engine. The engine is loaded once, in pytest's
own process. The checks are plain functions, so that other test runners can call them. Needs the extra `contract`.

bench    a subject under test, its samples, and the bench that runs them
checks   the checks; the worker relies on each of them
batches  those for an engine that computes tasks together
content  whether a file holds what its content type says
files    the files that a piece of code made and left
memory   the memory that this process holds
"""

from __future__ import annotations

from collections.abc import Callable

from inferq.consumers.testing.bench import Bench, ContractBroken, Run, Sample, Subject
from inferq.consumers.testing.checks import CHECKS, Check

__all__ = ["CHECKS", "Bench", "Check", "ContractBroken", "Run", "Sample", "Subject", "engine_contract"]


def engine_contract(*subjects: Subject) -> Callable[[Check, Bench], None]:
    """Return a pytest function that runs every check on every subject. Give it a name that begins with `test`."""
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
