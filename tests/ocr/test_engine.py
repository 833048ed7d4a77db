"""Reading with RapidOCR, the way a worker does."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from inferq.consumers.engine import Context, TaskAborted
from inferq.consumers.ocr import Line, OcrOutput, OcrTask
from inferq.consumers.ocr.backend import cut, detection_scale, out_of_memory
from inferq.consumers.ocr.engine import OcrEngine, load_backend
from inferq.consumers.ocr.settings import OcrSettings
from inferq.schemas import EngineInfo, InstallationError, InvalidTask, TransientFailure
from tests.ocr.conftest import Sample, ocr_task, sample
from tests.ocr.pdfs import three_pages

Read = Callable[..., OcrOutput]


def ink_in(page: np.ndarray, box: list[tuple[float, float]], *, margin: int) -> tuple[float, float]:
    """The shares of dark pixels inside a box, and in a band of `margin` pixels around it."""
    mask = Image.new("L", (page.shape[1], page.shape[0]))
    ImageDraw.Draw(mask).polygon(box, fill=1)
    inside = np.asarray(mask, bool)
    xs, ys = [x for x, _ in box], [y for _, y in box]
    around = np.zeros_like(inside)
    around[
        int(max(min(ys) - margin, 0)) : int(max(ys)) + margin,
        int(max(min(xs) - margin, 0)) : int(max(xs)) + margin,
    ] = True
    dark = page.min(axis=2) < 128
    return float(dark[inside].mean()), float(dark[around & ~inside].mean())


@pytest.mark.parametrize("name", ["invoice", "notice"])
def test_the_sample_pages_are_read_to_the_letter(read: Read, name: str) -> None:
    page = sample(name)
    output = read(page.path)
    assert output.text.splitlines() == page.lines
    assert [line.text for line in output.pages[0].lines] == page.lines
    assert output.page_count == 1
    assert (output.pages[0].page, output.pages[0].width, output.pages[0].height) == (1, 1240, 1000)
    assert all(line.score > 0.9 for line in output.pages[0].lines)
    pixels = np.asarray(page.image)
    for line in output.pages[0].lines:
        inside, around = ink_in(pixels, list(line.box), margin=4)
        assert inside > 0.05, line
        assert around < inside / 4, line


@pytest.mark.parametrize(("name", "quarter"), [("invoice", 90), ("notice", 180), ("notice", 270)])
def test_a_page_scanned_the_wrong_way_up_is_read_all_the_same(
    read: Read, tmp_path: Path, name: str, quarter: int
) -> None:
    page = sample(name).top(*{"invoice": (11, 400), "notice": (4, 340)}[name], tmp_path)
    turned = page.image.rotate(quarter, expand=True)
    turned.save(tmp_path / "a.png")
    output = read(tmp_path / "a.png")
    assert output.text.splitlines() == page.lines
    # The corners begin where the text begins, so cut out by them it stands upright.
    first = output.pages[0].lines[0]
    (x0, y0), (x1, y1) = first.box[0], first.box[1]
    direction = {90: (0, -1), 180: (-1, 0), 270: (0, 1)}[quarter]
    assert ((x1 - x0) * direction[0] + (y1 - y0) * direction[1]) > 250


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_exif_turns_the_page_and_its_boxes(
    read: Read, heading: Sample, tmp_path: Path, orientation: int
) -> None:
    stored = heading.image.rotate({3: 180, 6: 90, 8: 270}[orientation], expand=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.jpg", quality=98, subsampling=0, exif=exif)
    page = read(tmp_path / "a.jpg").pages[0]
    assert page.text.splitlines() == heading.lines
    assert (page.width, page.height) == (1240, 340)
    assert np.abs(np.array(page.lines[0].box[0]) - (428, 70)).max() < 12


def test_a_skewed_scan_is_read_in_order(read: Read, invoice: Sample, tmp_path: Path) -> None:
    page = invoice.top(11, 400, tmp_path)
    page.image.rotate(-4, expand=True, fillcolor=(252, 252, 250)).save(tmp_path / "a.png")
    assert read(tmp_path / "a.png").text.splitlines() == page.lines


def test_small_print_on_a_large_scan_is_found(read: Read, tmp_path: Path) -> None:
    page = Image.new("RGB", (4000, 3000), "white")
    pen = ImageDraw.Draw(page)
    font = ImageFont.load_default(15)
    expected = [f"Clause {number}: the small print counts" for number in range(1, 9)]
    for number, text in enumerate(expected):
        pen.text((150 + 400 * number, 150 + 330 * number), text, font=font, fill="black")
    page.save(tmp_path / "a.png")
    output = read(tmp_path / "a.png")
    assert output.text.splitlines() == expected
    for number, line in enumerate(output.pages[0].lines):
        assert np.abs(np.array(line.box[0]) - (150 + 400 * number, 150 + 330 * number)).max() < 14


def test_small_print_on_a_small_photo_is_found(engine: OcrEngine) -> None:
    large = Image.new("RGB", (1720, 1000), (205, 200, 190))
    pen = ImageDraw.Draw(large)
    for row in range(1, 18):
        text = f"Clause {row}: the small print counts"
        pen.text((40 + 50 * row, 20 + 57 * row), text, font=ImageFont.load_default(16), fill=(60, 60, 70))
    photo = np.array(large.resize((430, 250), Image.Resampling.LANCZOS))
    assert len(engine._backend._detect(photo)) == 17  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("height", "width", "scale"),
    [
        (368, 700, 2.0),
        (200, 300, 2.5),
        (80, 3000, 1.0),
        (1000, 1240, 1.0),
        (4000, 5000, 0.5),
        (400, 20_000, 0.79),
    ],
)
def test_small_pages_are_enlarged_and_large_ones_shrunk_for_detection(
    height: int, width: int, scale: float
) -> None:
    assert detection_scale(height, width, 5.0) == pytest.approx(scale, abs=0.005)


def strip(width: int, height: int, size: int, text: str) -> Image.Image:
    image = Image.new("L", (width, height), 255)
    ImageDraw.Draw(image).text(
        (width // 2, height // 2), text, font=ImageFont.load_default(size), anchor="mm"
    )
    return image


@pytest.mark.parametrize(
    ("image", "text"),
    [
        (strip(200, 26, 20, "Harbour 42"), "Harbour 42"),
        (strip(3000, 60, 36, "Harbour 42"), "Harbour 42"),
        (strip(40, 40, 26, "7"), "7"),
        (strip(60, 1400, 20, "A-12"), "A-12"),
        (strip(1, 1, 10, ""), ""),
        (strip(300, 300, 10, ""), ""),
    ],
    ids=["one line", "long strip", "one digit", "tall strip", "one pixel", "blank"],
)
def test_pictures_of_odd_shapes(read: Read, tmp_path: Path, image: Image.Image, text: str) -> None:
    image.save(tmp_path / "a.png")
    output = read(tmp_path / "a.png")
    assert output.text == text
    assert output.pages[0].text == text
    assert len(output.pages[0].lines) == bool(text)


def test_a_page_may_have_any_number_of_boxes(engine: OcrEngine) -> None:
    found_text = np.zeros((1, 1, 800, 1000), np.float32)
    for row in range(40):
        for column in range(30):
            found_text[0, 0, 20 * row + 4 : 20 * row + 14, 33 * column + 4 : 33 * column + 24] = 1
    detector = engine._backend._ocr.text_det  # type: ignore[attr-defined]
    boxes, _ = detector.postprocess_op(found_text, (800, 1000))
    assert len(boxes) == 1200


def test_lines_of_a_page_longer_than_opencv_allows_are_cut_out() -> None:
    corners = np.array([[10, 5], [90, 7], [90, 27], [10, 25]], np.float32)
    short = np.random.default_rng(1).integers(0, 256, (40, 100, 3)).astype(np.uint8)
    long = np.concatenate([np.zeros((39_000, 100, 3), np.uint8), short])
    assert (cut(long, corners + np.array([0, 39_000], np.float32)) == cut(short, corners)).all()


def test_a_line_longer_than_opencv_allows_is_cut_out() -> None:
    page = np.zeros((200, 40_000, 3), np.uint8)
    page[:, 39_000:] = 255
    corners = np.array([[0, 0], [40_000, 0], [40_000, 200], [0, 200]], np.float32)
    line = cut(page, corners)
    assert line.shape[1] / line.shape[0] == 200
    assert line[:, round(0.9 * line.shape[1])].max() == 0
    assert line[:, round(0.99 * line.shape[1])].min() == 255


def make_document(path: Path) -> None:
    pages = [strip(300, 80, 24, f"Page number {number}").convert("RGB") for number in (1, 2, 3)]
    pages.insert(2, Image.new("RGB", (300, 80), "white"))
    pages[0].save(path, save_all=True, append_images=pages[1:], resolution=100)


@pytest.mark.parametrize("kind", ["pdf", "tiff"])
def test_documents_are_read_page_by_page(
    engine: OcrEngine, make_context: Callable[..., Context], tmp_path: Path, kind: str
) -> None:
    make_document(tmp_path / f"a.{kind}")
    reports: list[tuple[float, str]] = []
    output = engine.run(ocr_task(), make_context(tmp_path / f"a.{kind}", reports))
    assert isinstance(output, OcrOutput)
    assert output.page_count == 4
    assert [page.page for page in output.pages] == [1, 2, 3, 4]
    assert output.text == "Page number 1\n\nPage number 2\n\nPage number 3"
    assert output.pages[2].lines == ()
    assert [fraction for fraction, _ in reports] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert reports[1][1] == "page 2 of 4"


def test_only_the_pages_asked_for_are_read(read: Read, tmp_path: Path) -> None:
    make_document(tmp_path / "a.pdf")
    output = read(tmp_path / "a.pdf", pages="4,2")
    assert output.page_count == 4
    assert [page.page for page in output.pages] == [2, 4]
    assert output.text == "Page number 2\n\nPage number 3"
    with pytest.raises(InvalidTask, match="the document has 4 pages"):
        read(tmp_path / "a.pdf", pages="5-")


def test_a_bad_page_does_not_cost_the_good_ones(read: Read, tmp_path: Path) -> None:
    text = b"BT /F 24 Tf 20 40 Td (Harbour 42) Tj ET"
    three_pages(tmp_path / "a.pdf", "3 0 R 9 0 R 4 0 R", text)
    output = read(tmp_path / "a.pdf")
    assert output.page_count == 3
    assert [(page.page, page.text) for page in output.pages] == [(1, "Harbour 42"), (3, "Harbour 42")]
    assert [(page.page, page.code) for page in output.failed_pages] == [(2, "truncated_image")]
    with pytest.raises(InvalidTask, match="page 2 of the PDF is damaged") as caught:
        read(tmp_path / "a.pdf", pages="2")
    assert caught.value.code == "truncated_image"


class Fixed:
    """A backend that reads the same two lines on every page, and keeps the shapes of the pages."""

    info = EngineInfo(name="fixed", version="1", model="none", device="cpu")

    def __init__(self, batch_size: int = 1) -> None:
        self.batch_size = batch_size
        self.read_together: list[int] = []
        self.shapes: list[tuple[int, ...]] = []

    def read(self, pages: Sequence[np.ndarray]) -> list[list[Line]]:
        self.read_together.append(len(pages))
        self.shapes += [page.shape for page in pages]
        lines = [Line(text="b", score=0.9, box=((0, 50), (9, 50), (9, 60), (0, 60))),
                 Line(text="a", score=0.9, box=((0, 10), (9, 10), (9, 20), (0, 20)))]  # fmt: skip
        return [lines for _ in pages]


def picture(path: Path, text: str, quarter: int = 0) -> Path:
    page = Image.new("RGB", (320, 56), "white")
    ImageDraw.Draw(page).text((16, 12), text, font=ImageFont.load_default(24), fill="black")
    page.rotate(quarter, expand=True).save(path)
    return path


def test_pages_read_together_give_what_each_gives_alone(
    engine: OcrEngine,
    make_context: Callable[..., Context],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    paths = [
        picture(tmp_path / "a.png", "Harbour 42"),
        picture(tmp_path / "b.png", "Upside down", 180),
        picture(tmp_path / "c.png", ""),
    ]
    tasks = [ocr_task(), ocr_task(min_score=0), ocr_task()]
    alone = [engine.run(task, make_context(path)) for task, path in zip(tasks, paths, strict=True)]
    assert [output.text for output in alone] == ["Harbour 42", "Upside down", ""]
    monkeypatch.setattr(engine._backend, "batch_size", 3)
    assert engine.run_batch(tasks, [make_context(path) for path in paths]) == alone


@pytest.mark.parametrize(("batch_size", "together"), [(1, [1] * 7), (4, [4, 3]), (8, [7])])
def test_pages_of_several_tasks_are_read_together(
    make_context: Callable[..., Context], tmp_path: Path, batch_size: int, together: list[int]
) -> None:
    make_document(tmp_path / "a.tiff")
    small = picture(tmp_path / "b.png", "")
    backend = Fixed(batch_size)
    with closing(OcrEngine(backend=backend)) as engine:
        outputs = engine.run_batch(
            [ocr_task(), ocr_task(pages="2-3"), ocr_task()],
            [make_context(tmp_path / "a.tiff"), make_context(tmp_path / "a.tiff"), make_context(small)],
        )
    assert [[page.page for page in output.pages] for output in outputs if isinstance(output, OcrOutput)] == [
        [1, 2, 3, 4], [2, 3], [1],
    ]  # fmt: skip
    assert backend.read_together == together


def test_large_pages_are_not_collected(
    make_context: Callable[..., Context], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inferq.consumers.ocr.engine._BATCH_PIXELS", 3 * 320 * 56)
    path = picture(tmp_path / "a.png", "")
    backend = Fixed(8)
    with closing(OcrEngine(backend=backend)) as engine:
        engine.run_batch([ocr_task()] * 4, [make_context(path) for _ in range(4)])
    assert backend.read_together == [3, 1]


def test_a_bad_file_and_a_cancelled_task_cost_the_others_nothing(
    make_context: Callable[..., Context], tmp_path: Path
) -> None:
    good = picture(tmp_path / "a.png", "")
    bad = tmp_path / "bad.png"
    bad.write_bytes(good.read_bytes()[:100])
    reports: list[tuple[float, str]] = []
    backend = Fixed(8)
    with closing(OcrEngine(backend=backend)) as engine:
        invalid, cancelled, decoded, read = engine.run_batch(
            [ocr_task()] * 4,
            [
                make_context(bad),
                make_context(good, abort=lambda: True),
                make_context(good, reports, lambda: bool(reports)),
                make_context(good),
            ],
        )
    assert isinstance(invalid, InvalidTask)
    assert invalid.code == "truncated_image"
    assert isinstance(cancelled, TaskAborted)
    assert isinstance(decoded, TaskAborted)  # cancelled once its page was decoded: it is not read
    assert isinstance(read, OcrOutput)
    assert read.text == "a\nb"
    assert backend.read_together == [1]


@pytest.mark.parametrize(
    ("url", "together"),
    [
        ("https://example.com/a.png", True),
        ("https://example.com/scan?of=a.pdf", True),
        ("https://example.com/a.PDF", False),
        ("https://example.com/a.tif?x=1", False),
        ("data:application/pdf;base64,AA==", False),
        ("data:image/png;base64,AA==", True),
    ],
)
def test_documents_go_alone(url: str, *, together: bool) -> None:
    engine = OcrEngine(backend=Fixed(8))

    def key(task_id: str, url: str, **options: Any) -> Hashable:
        task = {"task_id": task_id, "task_type": "ocr", "image_url": url, "options": options}
        return engine.batch_key(OcrTask.model_validate(task))

    assert (key("one", url) == key("two", url)) is together
    assert (key("one", url) == key("two", "https://example.com/b.jpg", annotated=True)) is together


def test_more_pages_than_one_task_may_read_are_refused(
    make_context: Callable[..., Context], tmp_path: Path
) -> None:
    make_document(tmp_path / "a.pdf")
    with closing(OcrEngine(OcrSettings(ocr_max_pages=2), backend=Fixed())) as engine:
        with pytest.raises(InvalidTask, match=r"4 pages.*may read at most 2.*options\.pages") as caught:
            engine.run(ocr_task(), make_context(tmp_path / "a.pdf"))
        assert caught.value.code == "too_many_pages"
        assert len(engine.run(ocr_task(pages="1-2"), make_context(tmp_path / "a.pdf")).pages) == 2


def test_a_run_stops_between_pages_when_it_is_asked_to(
    engine: OcrEngine, make_context: Callable[..., Context], tmp_path: Path
) -> None:
    make_document(tmp_path / "a.tiff")
    reports: list[tuple[float, str]] = []
    context = make_context(tmp_path / "a.tiff", reports, lambda: len(reports) == 2)
    with pytest.raises(TaskAborted):
        engine.run(ocr_task(), context)
    assert len(reports) == 2


def test_the_boxes_are_drawn_where_that_is_asked_for(
    engine: OcrEngine, make_context: Callable[..., Context], tmp_path: Path
) -> None:
    make_document(tmp_path / "a.tiff")
    context = make_context(tmp_path / "a.tiff")
    output = engine.run(ocr_task(annotated=True, pages="1-2"), context)
    assert isinstance(output, OcrOutput)
    assert [artifact.name for artifact in context.artifacts] == ["annotated.png", "annotated-2.png"]
    for artifact, page in zip(context.artifacts, output.pages, strict=True):
        assert artifact.content_type == "image/png"
        with Image.open(artifact.path) as drawn:
            assert drawn.size == (page.width, page.height)
            x, y = (round(value) for value in page.lines[0].box[2])
            around = drawn.convert("RGB").crop((x - 1, y - 1, x + 2, y + 2))  # corners lie between pixels
            assert (226, 38, 77) in {around.getpixel((n % 3, n // 3)) for n in range(9)}


def test_without_being_asked_nothing_is_left_behind(
    engine: OcrEngine, make_context: Callable[..., Context], heading: Sample
) -> None:
    context = make_context(heading.path)
    engine.run(ocr_task(), context)
    assert context.artifacts == []


def test_uncertain_lines_are_left_out(read: Read, heading: Sample) -> None:
    scores = sorted(line.score for line in read(heading.path, min_score=0).pages[0].lines)
    middle = scores[len(scores) // 2]
    kept = read(heading.path, min_score=middle).pages[0].lines
    assert len(kept) == sum(score >= middle for score in scores)
    assert all(line.score >= middle for line in kept)


def test_the_engine_says_what_it_is_and_warms_up() -> None:
    engine = OcrEngine()
    info = engine.load()
    assert (info.name, info.model, info.device) == ("rapidocr", "PP-OCRv6_small", "cpu")
    assert info.version[0].isdigit()
    engine.warm_up()
    engine.close()
    with pytest.raises(RuntimeError, match=r"call load\(\) first"):
        engine.warm_up()


@pytest.mark.parametrize("device", ["gpu", "cuda", "cuda:1"])
def test_a_gpu_that_is_not_there_is_an_error_and_never_a_slow_cpu(
    monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    monkeypatch.setenv("INFERQ_DEVICE", device)
    with pytest.raises(InstallationError, match=f"INFERQ_DEVICE={device}") as caught:
        OcrEngine().load()
    assert caught.value.code == "device_unavailable"


@pytest.mark.parametrize(
    ("name", "value"),
    [("INFERQ_DEVICE", "tpu"), ("INFERQ_OCR_BACKEND", "tesseract"), ("INFERQ_OCR_THREADS", "0")],
)
def test_a_setting_that_means_nothing_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(InstallationError, match=name):
        OcrEngine()


def test_ocr_may_have_a_device_of_its_own() -> None:
    assert load_backend(OcrSettings(device="gpu", ocr_device="cpu")).info.device == "cpu"
    if "CUDAExecutionProvider" not in pytest.importorskip("onnxruntime").get_available_providers():
        with pytest.raises(InstallationError, match="CUDA"):
            load_backend(OcrSettings(ocr_device="gpu"))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("ResourceExhaustedError: Out of memory error on GPU 0. Cannot allocate 2.1GB"),
        RuntimeError("[ONNXRuntimeError] : 1 : FAIL : CUDA failure 2: out of memory"),
        RuntimeError("BFCArena: Failed to allocate memory for requested buffer of size 4096"),
    ],
)
def test_a_gpu_out_of_memory_is_worth_another_attempt(error: Exception) -> None:
    failure = out_of_memory(error, [np.zeros((3000, 2000, 3), np.uint8)])
    assert isinstance(failure, TransientFailure)
    assert failure.code == "out_of_memory"
    assert "2000×3000" in failure.message


def test_other_errors_are_not_taken_for_a_lack_of_memory(
    engine: OcrEngine, make_context: Callable[..., Context], invoice: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert out_of_memory(ValueError("a bad shape"), [np.zeros((1, 1, 3), np.uint8)]) is None

    def fail(error: Exception) -> None:
        def detect(_: object) -> object:
            raise error

        monkeypatch.setattr(engine._backend._ocr, "text_det", detect)  # type: ignore[attr-defined]

    fail(ValueError("a bad shape"))
    with pytest.raises(ValueError, match="a bad shape"):
        engine.run(ocr_task(), make_context(invoice.path))
    fail(RuntimeError("CUDA out of memory"))
    with pytest.raises(TransientFailure) as caught:
        engine.run(ocr_task(), make_context(invoice.path))
    assert caught.value.__cause__ is not None


def test_any_backend_will_do(make_context: Callable[..., Context], invoice: Sample) -> None:
    fixed = Fixed()
    with closing(OcrEngine(backend=fixed)) as engine:
        assert engine.run(ocr_task(), make_context(invoice.path)).text == "a\nb"
    assert fixed.shapes == [(1000, 1240, 3)]
