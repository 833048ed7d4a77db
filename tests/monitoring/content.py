"""The expressions of the boards and the rules, as Grafana and Prometheus read them from the files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import yaml

from k8s.monitoring.observe import BOARDS, RULES
from tests.monitoring.promql import Use, uses

_VARIABLES = {"$__rate_interval": "5m", "$task_type": "ocr"}


@dataclass(frozen=True)
class Expression:
    """An expression without variables, and the labels that a legend or an alert's text takes from its result."""

    place: str
    expr: str
    labels: frozenset[str]

    def uses(self) -> list[Use]:
        return uses(self.expr, self.labels)


@cache
def boards() -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text("utf-8")) for path in sorted(BOARDS.glob("*.json"))}


def panels(board: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in board["panels"] if panel["type"] != "row"]


@cache
def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text("utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def expressions() -> Iterator[Expression]:
    for name, board in boards().items():
        for panel in panels(board):
            for target in panel["targets"]:
                expr = target["expr"]
                for variable, value in _VARIABLES.items():
                    expr = expr.replace(variable, value)
                legend = re.findall(r"{{ *(\w+) *}}", target["legendFormat"])
                yield Expression(f"{name}: {panel['title']}", expr, frozenset(legend))
    for rule in alerts():
        text = " ".join((*rule["annotations"].values(), *rule["labels"].values()))
        yield Expression(rule["alert"], rule["expr"], frozenset(re.findall(r"\$labels\.(\w+)", text)))
