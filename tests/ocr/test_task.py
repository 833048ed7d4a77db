"""What an OCR task may say."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from inferq.consumers.ocr import OcrTask, task_type
from inferq.consumers.ocr.selection import select_pages
from inferq.schemas import InvalidTask, parse_task


def test_the_bare_message_of_any_producer_is_a_whole_task() -> None:
    task = parse_task(
        '{"task_id": "ocr_001", "image_url": "https://example.com/images/id_card.jpg", "task_type": "ocr"}'
    )
    assert isinstance(task, OcrTask)
    assert task.options.pages is None
    assert not task.options.annotated
    assert task.inputs() == {"image_url": "https://example.com/images/id_card.jpg"}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"anotated": True}, "anotated"),
        ({"min_score": 1.5}, "min_score"),
        ({"min_score": -0.1}, "min_score"),
        ({"pages": "0"}, "page numbers start at 1"),
        ({"pages": "3-1"}, "3-1 ends before it starts"),
        ({"pages": ""}, "pages"),
        ({"pages": "1,,2"}, "pages"),
        ({"pages": "-3"}, "pages"),
        ({"pages": "all"}, "pages"),
        ({"pages": "1" * 300}, "pages"),
        ({"pages": "١"}, "pages"),
    ],
)
def test_a_wrong_option_is_refused_by_name(options: dict[str, object], named: str) -> None:
    with pytest.raises(InvalidTask, match=named):
        parse_task({"task_id": "a", "task_type": "ocr", "image_url": "data:,x", "options": options})


def test_a_task_without_an_image_is_refused() -> None:
    with pytest.raises(InvalidTask, match="image_url"):
        parse_task({"task_id": "a", "task_type": "ocr"})


@pytest.mark.parametrize(
    ("selection", "count", "expected"),
    [
        (None, 3, [1, 2, 3]),
        ("2", 3, [2]),
        ("3,1", 3, [1, 3]),
        ("1-2,2-3,2", 9, [1, 2, 3]),
        ("2-", 4, [2, 3, 4]),
        ("1-999999", 2, [1, 2]),
        ("2,9", 3, [2]),
    ],
)
def test_a_selection_names_pages(selection: str | None, count: int, expected: list[int]) -> None:
    assert select_pages(selection, count) == expected


@pytest.mark.parametrize("selection", ["4", "4-", "5-7,9"])
def test_a_selection_that_leaves_no_page_is_an_error(selection: str) -> None:
    with pytest.raises(InvalidTask, match="the document has 3 pages") as caught:
        select_pages(selection, 3)
    assert caught.value.code == "no_such_page"


@given(st.from_regex(r"[1-9][0-9]{0,2}(-([1-9][0-9]{0,2})?)?(,[1-9][0-9]{0,2})*", fullmatch=True))
def test_whatever_is_selected_exists(selection: str) -> None:
    try:
        pages = select_pages(selection, 40)
    except InvalidTask:
        return
    assert pages == sorted(set(pages))
    assert all(1 <= page <= 40 for page in pages)


def test_describing_the_type_loads_no_library() -> None:
    heavy = "{'numpy', 'PIL', 'cv2', 'onnxruntime', 'rapidocr', 'pypdfium2', 'paddle'}"
    code = (
        f"import sys, inferq.consumers.ocr; assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert task_type.arguments == ("image_url",)


def test_one_page_may_be_a_number() -> None:
    fields = {"task_id": "t", "task_type": "ocr", "image_url": "https://example.com/a.png"}
    one, same = (OcrTask.model_validate({**fields, "options": {"pages": pages}}) for pages in (1, "1"))
    assert one.options.pages == "1"
    assert one.digest() == same.digest()
    for wrong in (0, -1, True, 1.5, [1]):
        with pytest.raises(ValidationError):
            OcrTask.model_validate({**fields, "options": {"pages": wrong}})
