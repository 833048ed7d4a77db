"""Tests that every engine has to pass, for the test suite of a task type. Needs the extra `contract`.

from inferq.testing import Sample, Subject, engine_contract

test_contract = engine_contract(Subject(task_type, samples=[Sample({"text": "fine"})]))
"""

from inferq.consumers.testing import (
    CHECKS,
    Bench,
    Check,
    ContractBroken,
    Run,
    Sample,
    Subject,
    engine_contract,
)

__all__ = ["CHECKS", "Bench", "Check", "ContractBroken", "Run", "Sample", "Subject", "engine_contract"]
