"""Every engine of inferq's own keeps the contract. A new one joins with a Subject."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from inferq.consumers.testing import Sample, Subject, engine_contract
from inferq.schemas import get_type

PORTRAITS = Path(__file__).parents[2] / "examples" / "portraits"
COLLINS = (PORTRAITS / "portrait_collins.png").read_bytes()
HOPPER = (PORTRAITS / "portrait_hopper.jpg").read_bytes()


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
    Subject(
        get_type("ner"),
        samples=[
            Sample({"text": "张伟在北京大学工作。"}),
            Sample(
                {
                    "texts": ["李娜去了上海。", "二〇二五年五月"],
                    "options": {"dictionary": {"DRUG": ["青霉素"]}},
                }
            ),
            Sample(files={"text_url": "王芳来自广州。".encode()}),
        ],
        refused=[
            Sample(code="invalid_task"),
            Sample({"text": " "}, code="invalid_task"),
            Sample(files={"text_url": b""}, code="empty_text"),
            Sample(files={"text_url": "北京".encode("gb18030")}, code="not_utf8"),
        ],
    ),
    Subject(
        get_type("facefusion"),
        samples=[
            Sample(files={"source_url": COLLINS, "target_url": HOPPER}),
            Sample({"options": {"format": "jpeg"}}, {"source_url": HOPPER, "target_url": COLLINS}),
        ],
        refused=[
            Sample(code="invalid_task"),
            Sample(files={"source_url": COLLINS, "target_url": document("no face")}, code="no_face_found"),
            Sample(files={"source_url": COLLINS[:5000], "target_url": HOPPER}, code="truncated_image"),
            Sample({"options": {"face": -1}}, {"source_url": COLLINS, "target_url": HOPPER}),
        ],
    ),
    Subject(
        get_type("acestep"),
        samples=[
            Sample({"prompt": "fast drums", "duration": 1.5, "seed": 1}),
            Sample({"prompt": "slow sad piano", "duration": 1, "seed": 2, "options": {"format": "mp3"}}),
        ],
        refused=[
            Sample({"prompt": "a"}, code="invalid_task"),
            Sample({"prompt": "ten hours of it", "duration": 36_000}, code="invalid_task"),
        ],
    ),
)
