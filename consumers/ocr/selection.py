"""Parses page selections such as `1-3,7` or `5-`."""

from __future__ import annotations

from inferq.schemas import InvalidTask


def check_selection(selection: str) -> str:
    """Give `selection` back. Raises ValueError for a page 0, and for a range whose end precedes its start."""
    for first, last in _ranges(selection):
        if first < 1:
            raise ValueError("page numbers start at 1")
        if last is not None and last < first:
            raise ValueError(f"the range {first}-{last} ends before it starts")
    return selection


def select_pages(selection: str | None, page_count: int) -> list[int]:
    """The selected page numbers of a document with `page_count` pages, ascending, each once.

    Raises InvalidTask (`no_such_page`) if the selection matches no page.
    """
    if selection is None:
        return list(range(1, page_count + 1))
    chosen: set[int] = set()
    for first, last in _ranges(selection):
        chosen.update(range(first, min(page_count if last is None else last, page_count) + 1))
    if not chosen:
        raise InvalidTask(
            f"options.pages {selection!r} selects no page: the document has "
            + ("1 page" if page_count == 1 else f"{page_count} pages"),
            code="no_such_page",
        )
    return sorted(chosen)


def _ranges(selection: str) -> list[tuple[int, int | None]]:
    ranges: list[tuple[int, int | None]] = []
    for part in selection.split(","):
        first, dash, last = part.partition("-")
        ranges.append((int(first), (int(last) if last else None) if dash else int(first)))
    return ranges
