"""Which metrics, and which of their labels, an expression needs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import promql_parser as promql

_CHOOSE = ("topk", "bottomk")
"""Aggregations that keep the labels of their series."""


@dataclass(frozen=True)
class Use:
    """A metric, and the labels that it must have."""

    metric: str
    labels: frozenset[str]


class LostLabel(ValueError):
    """A label is used above an aggregation that drops it."""


def uses(expr: str, labels: frozenset[str] = frozenset()) -> list[Use]:
    """The metrics of an expression whose result has `labels`. Raises ValueError if it does not parse."""
    return list(_uses(promql.parse(expr), labels))


def _uses(node: Any, needed: frozenset[str]) -> Iterator[Use]:
    match type(node).__name__:
        case "VectorSelector":
            matched = {matcher.name for matcher in node.matchers.matchers}
            yield Use(node.name, needed | matched - {"__name__"})
        case "MatrixSelector":
            yield from _uses(node.vector_selector, needed)
        case "SubqueryExpr" | "ParenExpr" | "UnaryExpr":
            yield from _uses(node.expr, needed)
        case "AggregateExpr" if str(node.op) in _CHOOSE:
            yield from _uses(node.expr, needed)
        case "AggregateExpr":
            kept = frozenset(node.modifier.labels if node.modifier else ())
            if not needed <= kept:
                raise LostLabel(f"{node.prettify()} has no label {', '.join(sorted(needed - kept))}")
            yield from _uses(node.expr, kept)
        case "BinaryExpr":
            matching = node.modifier.matching if node.modifier else None
            include = promql.LabelModifierType.Include
            on = frozenset(matching.labels if matching and matching.type == include else ())
            yield from _uses(node.lhs, needed | on)
            yield from _uses(node.rhs, on | needed if str(node.op) == "or" else on)
        case "Call":
            inner = needed | {"le"} if node.func.name == "histogram_quantile" else needed
            for argument in node.args:
                yield from _uses(argument, frozenset() if node.func.name == "absent" else inner)
        case "NumberLiteral" | "StringLiteral":
            pass
        case other:
            raise NotImplementedError(other)
