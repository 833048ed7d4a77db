"""Which pages of a document are meant by a selection such as `1-3,7` or `5-`."""

from __future__ import annotations

from inferq.schemas import InvalidTask


def check_selection(selection: str) -> str:
    """Raises ValueError for a page 0, and for a range that runs backwards."""
    for first, last in _ranges(selection):
        if first < 1:
            raise ValueError("pages count from 1")
        if last is not None and last < first:
            raise ValueError(f"the range {first}-{last} runs backwards")
    return selection


def select_pages(selection: str | None, page_count: int) -> list[int]:
    """The page numbers meant, ascending and each once, out of a document of `page_count` pages.

    Raises InvalidTask (`no_such_page`) where the selection leaves none.
    """
    if selection is None:
        return list(range(1, page_count + 1))
    chosen: set[int] = set()
    for first, last in _ranges(selection):
        chosen.update(range(first, min(page_count if last is None else last, page_count) + 1))
    if not chosen:
        raise InvalidTask(
            f"options.pages {selection!r} selects nothing: the document has "
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
