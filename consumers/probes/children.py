"""The children of a labelled metric, found fast and bounded in number."""

from __future__ import annotations

from typing import Generic, TypeVar

from prometheus_client.metrics import MetricWrapperBase

from inferq.schemas.metrics import BoundedLabel

M = TypeVar("M", bound=MetricWrapperBase)


class Children(Generic[M]):
    """The children of a metric by the values of its labels. `bounds` bound the labels that they name.

    The children are kept, because the library's own `labels` takes several times as long as counting.
    """

    def __init__(self, metric: M, **bounds: BoundedLabel) -> None:
        self._metric = metric
        self._bounds = [(metric._labelnames.index(name), bound) for name, bound in bounds.items()]
        self._children: dict[tuple[str, ...], M] = {}

    def __call__(self, *labels: str) -> M:
        child = self._children.get(labels)
        if child is None:
            values = list(labels)
            for place, bound in self._bounds:
                values[place] = bound(values[place])
            child = self._children[tuple(values)] = self._metric.labels(*values)
        return child
