"""The Grafana boards: that they load, and that each query parses."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pytest

from k8s.monitoring.generate import generated
from tests.monitoring.content import boards, expressions, panels
from tests.monitoring.promql import LostLabel, Use, uses

BOARDS = boards()


def test_there_is_a_board_for_each_question() -> None:
    assert list(BOARDS) == ["batches", "callbacks", "overview", "task-type"]


@pytest.mark.parametrize("name", BOARDS)
def test_a_board_can_be_loaded_beside_the_others(name: str) -> None:
    board = BOARDS[name]
    assert board["schemaVersion"] == 42
    assert "id" not in board  # a number of one Grafana
    assert sum(board["uid"] == other["uid"] for other in BOARDS.values()) == 1
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("name", BOARDS)
def test_a_board_asks_the_data_source_of_its_variable(name: str) -> None:
    board = BOARDS[name]
    source = {"type": "prometheus", "uid": "${datasource}"}
    variables = {each["name"]: each for each in board["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    for panel in panels(board):
        assert panel["datasource"] == source
        assert all(target["datasource"] == source for target in panel["targets"])
    text = json.dumps(board["panels"])
    assert ("task_type" in variables) == ("$task_type" in text)


@pytest.mark.parametrize("name", BOARDS)
def test_no_panel_covers_another(name: str) -> None:
    def covered(place: dict[str, int]) -> set[tuple[int, int]]:
        assert place["x"] + place["w"] <= 24
        return {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }

    places = [(panel["title"], covered(panel["gridPos"])) for panel in BOARDS[name]["panels"]]
    assert [(a, b) for (a, one), (b, other) in combinations(places, 2) if one & other] == []


def test_each_query_parses_and_keeps_the_labels_of_its_legend() -> None:
    for expression in expressions():
        assert expression.uses(), expression.place


def test_prometheus_accepts_each_query(promtool: Callable[..., str], tmp_path: Path) -> None:
    rules = [
        {"record": f"panel:{number}", "expr": each.expr} for number, each in enumerate(expressions(), start=1)
    ]
    file = tmp_path / "panels.yaml"
    file.write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))
    assert f"{len(rules)} rules found" in promtool("check", "rules", file)


def test_generated_files_are_current() -> None:
    assert [path.name for path, text in generated().items() if path.read_text("utf-8") != text] == []


def test_the_labels_that_a_metric_needs_are_found() -> None:
    assert uses('sum by (a) (rate(x_total{b="c"}[5m])) / on (a) y', frozenset({"a"})) == [
        Use("x_total", frozenset({"a", "b"})),
        Use("y", frozenset({"a"})),
    ]
    assert uses("histogram_quantile(0.5, sum by (le) (x_bucket)) or vector(0)") == [
        Use("x_bucket", frozenset({"le"}))
    ]
    with pytest.raises(LostLabel, match="no label b"):
        uses("sum by (a) (x)", frozenset({"b"}))
    with pytest.raises(ValueError, match="parenthesis"):
        uses("sum by (a (x)")
