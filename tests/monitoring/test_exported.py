"""Boards and rules use only what is exported. tests/up/test_up.py asks the same of running parts."""

from __future__ import annotations

import pytest

from tests.monitoring.exported import OF_OTHERS, declared, lacking, served, used
from tests.probes.registries import install_a_gpu


def test_boards_and_rules_use_metrics_and_labels_that_the_parts_declare(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install_a_gpu(monkeypatch)
    assert lacking(declared()) == {}


def test_boards_and_rules_use_few_metrics_of_others() -> None:
    assert {name for name in used() if not name.startswith("inferq_")} == OF_OTHERS


def test_a_metric_or_a_label_that_is_not_exported_is_found() -> None:
    page = (
        '# TYPE inferq_workers gauge\ninferq_workers{task_type="echo"} 1\n# TYPE inferq_callbacks counter\n'
    )
    assert served([page]) == {"inferq_workers": frozenset({"task_type"}), "inferq_callbacks_total": None}
    faults = lacking(served([page]))
    assert faults["inferq_workers"] == "no label state"
    assert faults["inferq_queue_messages"] == "missing"
    assert "inferq_callbacks_total" not in faults
