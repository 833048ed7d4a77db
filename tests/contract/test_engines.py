"""Every engine of inferq's own keeps the contract. A new one joins with a Subject."""

from __future__ import annotations

import io

from PIL import Image, ImageDraw, ImageFont

from consumers.testing import Sample, Subject, engine_contract
from schemas import get_type


def document(*pages: str, kind: str = "PNG") -> bytes:
    """A picture with a line of text, or several of them."""
    pictures = []
    for text in pages:
        pictures.append(Image.new("RGB", (240, 48), "white"))
        ImageDraw.Draw(pictures[-1]).text((12, 8), text, font=ImageFont.load_default(24), fill="black")
    file = io.BytesIO()
    more = {"save_all": True, "append_images": pictures[1:]} if pictures[1:] else {}
    pictures[0].save(file, kind, **more)
    return file.getvalue()


test_engines = engine_contract(
    Subject(
        get_type("echo"),
        samples=[Sample({"payload": {"a": [1, None, "好"]}}), Sample({"payload": "x", "delay": 0.12})],
        refused=[Sample({"delay": -1}), Sample({"delay": "long"}), Sample({"paylod": 1})],
    ),
    Subject(
        get_type("ocr"),
        samples=[
            Sample({"options": {"annotated": True}}, {"image_url": document("Harbour 42")}),
            Sample(files={"image_url": document("one", "two", kind="TIFF")}),
        ],
        refused=[
            Sample(code="invalid_task"),
            Sample(files={"image_url": b""}, code="empty_file"),
            Sample(files={"image_url": b"no picture"}, code="not_an_image"),
            Sample(files={"image_url": document("cut off")[:200]}, code="truncated_image"),
            Sample({"options": {"pages": "2"}}, {"image_url": document("one")}, code="no_such_page"),
        ],
    ),
)
