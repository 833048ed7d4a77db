"""A board as Grafana's JSON.

grafana-foundation-sdk builds such JSON too, but its versions cannot be bounded: an epoch orders them by date of
build, so that the highest one is for the oldest Grafana.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

_COLUMNS = 24
_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


@dataclass(frozen=True)
class Query:
    """A PromQL expression and the legend of its series."""

    expr: str
    legend: str = ""


@dataclass(frozen=True)
class Panel:
    """A graph over time, or the latest values.

    `width` is in columns of 24. `unit` is Grafana's name of one. `steps` are colours from a value on; below the
    first it is green. `words` replace values by a text and a colour. `text` explains the panel.
    """

    title: str
    queries: Sequence[Query]
    kind: Literal["timeseries", "stat"] = "timeseries"
    width: int = 8
    unit: str = "short"
    most: float | None = None
    stack: bool = False
    steps: Mapping[float, str] = field(default_factory=dict)
    words: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    text: str = ""

    @property
    def height(self) -> int:
        return 4 if self.kind == "stat" else 8


class Row:
    """A heading and the panels below it."""

    def __init__(self, title: str, *panels: Panel) -> None:
        self.title = title
        self.panels = panels


class Board:
    """A dashboard. `types` is what its variable `task_type` selects; None leaves the variable out."""

    def __init__(self, uid: str, title: str, types: Literal["all", "one"] | None, *rows: Row) -> None:
        self.uid = uid
        self.title = title
        self.types = types
        self.rows = rows


def board_json(board: Board) -> str:
    """The board as a file that Grafana imports, or loads by provisioning."""
    model = {
        "uid": board.uid,
        "title": board.title,
        "tags": ["inferq"],
        "schemaVersion": 42,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "links": [
            {
                "type": "dashboards",
                "tags": ["inferq"],
                "title": "inferq",
                "keepTime": True,
                "includeVars": True,
            }
        ],
        "annotations": {"list": [_ALERTS]},
        "templating": {"list": list(_variables(board))},
    }
    # A panel on each line: a change of one panel changes one line.
    lines = [f"{_json(name)}: {_json(value)}" for name, value in model.items()]
    panels = ",\n  ".join(map(_json, _panels(board)))
    return "{\n " + ",\n ".join(lines) + f',\n "panels": [\n  {panels}\n ]\n}}\n'


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


_ALERTS = {
    "name": "Alerts",
    "datasource": _DATASOURCE,
    "enable": True,
    "iconColor": "red",
    "expr": 'ALERTS{alertname=~"Inferq.*",alertstate="firing"}',
    "titleFormat": "{{alertname}}",
    "textFormat": "{{task_type}}{{schedule}}{{service}}",
}


def _variables(board: Board) -> Iterator[dict[str, Any]]:
    yield {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}
    if board.types is not None:
        every = board.types == "all"
        yield {
            "name": "task_type",
            "label": "Type",
            "type": "query",
            "datasource": _DATASOURCE,
            "query": {"query": "label_values(inferq_queue_messages, task_type)", "refId": "task_type"},
            "refresh": 2,
            "sort": 1,
            "multi": every,
            "includeAll": every,
            **({"allValue": ".*", "current": {"text": ["All"], "value": ["$__all"]}} if every else {}),
        }


def _panels(board: Board) -> Iterator[dict[str, Any]]:
    number, top = 0, 0
    for row in board.rows:
        number += 1
        yield {
            "id": number,
            "type": "row",
            "title": row.title,
            "collapsed": False,
            "gridPos": {"x": 0, "y": top, "w": _COLUMNS, "h": 1},
            "panels": [],
        }
        top += 1
        left, line = 0, 0
        for panel in row.panels:
            if left + panel.width > _COLUMNS:
                left, top, line = 0, top + line, 0
            number += 1
            place = {"x": left, "y": top, "w": panel.width, "h": panel.height}
            yield {"id": number, "gridPos": place, **_panel(panel)}
            left, line = left + panel.width, max(line, panel.height)
        top += line


def _panel(panel: Panel) -> dict[str, Any]:
    steps: list[dict[str, str | float | None]] = [{"color": "green", "value": None}]
    steps += [{"color": color, "value": value} for value, color in panel.steps.items()]
    defaults: dict[str, Any] = {
        "unit": panel.unit,
        "min": 0,
        "thresholds": {"mode": "absolute", "steps": steps},
    }
    if panel.most is not None:
        defaults["max"] = panel.most
    if panel.words:
        words = {value: {"text": text, "color": color} for value, (text, color) in panel.words.items()}
        defaults["mappings"] = [{"type": "value", "options": words}]
    options: dict[str, Any]
    if panel.kind == "stat":
        defaults["noValue"] = "unknown"
        options = {
            "reduceOptions": {"calcs": ["lastNotNull"], "values": False},
            "colorMode": "background" if panel.words or panel.steps else "value",
            "graphMode": "none",
        }
    else:
        defaults["custom"] = {
            "fillOpacity": 20 if panel.stack else 0,
            "showPoints": "never",
            "spanNulls": False,
        }
        if panel.stack:
            defaults["custom"]["stacking"] = {"mode": "normal", "group": "A"}
        options = {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
    return {
        "type": panel.kind,
        "title": panel.title,
        **({"description": panel.text} if panel.text else {}),
        "datasource": _DATASOURCE,
        "targets": [
            {
                "refId": chr(ord("A") + number),
                "datasource": _DATASOURCE,
                "expr": query.expr,
                "legendFormat": query.legend or "__auto",
                "instant": panel.kind == "stat",
                "range": panel.kind != "stat",
            }
            for number, query in enumerate(panel.queries)
        ],
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
    }
