"""The PaddleOCR backend. What needs paddleocr is skipped where it is not installed: `make test-engines`."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import yaml
from PIL import Image

from inferq.consumers.engine import Context
from inferq.consumers.ocr import OcrOutput
from inferq.consumers.ocr.engine import OcrEngine
from inferq.consumers.ocr.paddle import PaddleBackend
from inferq.schemas import InstallationError, TransientFailure
from tests.ocr.conftest import Sample, ocr_task

with_paddleocr = pytest.mark.skipif(
    importlib.util.find_spec("paddleocr") is None, reason="paddleocr is not installed"
)
with_paddle = pytest.mark.skipif(
    importlib.util.find_spec("paddle") is None, reason="paddlepaddle is not installed"
)

# PaddleOCR's dependencies warn of their own doings when they are imported.
pytestmark = [pytest.mark.engines, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RapidOCR's weights in the folders that PaddleOCR expects."""
    import onnxruntime
    import rapidocr

    weights = Path(rapidocr.__file__).parent / "models"
    recognition = onnxruntime.InferenceSession(str(weights / "PP-OCRv6_rec_small.onnx"))
    characters = recognition.get_modelmeta().custom_metadata_map["character"].splitlines()
    decode = {"DecodeImage": {"channel_first": False, "img_mode": "BGR"}}
    normalize = {
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "scale": "1./255.",
        "order": "hwc",
    }
    descriptions = {
        "det": (
            [
                decode,
                {"DetResizeForTest": {"resize_long": 960}},
                {"NormalizeImage": normalize},
                {"ToCHWImage": None},
            ],
            {
                "name": "DBPostProcess",
                "thresh": 0.3,
                "box_thresh": 0.6,
                "max_candidates": 1000,
                "unclip_ratio": 1.5,
            },
        ),
        "rec": (
            [decode, {"RecResizeImg": {"image_shape": [3, 48, 320]}}],
            {"name": "CTCLabelDecode", "character_dict": characters},
        ),
    }
    root = tmp_path_factory.mktemp("models")
    for role, (operations, decoding) in descriptions.items():
        name = f"PP-OCRv6_small_{role}"
        (root / name).mkdir()
        (root / name / "inference.onnx").symlink_to(weights / f"PP-OCRv6_{role}_small.onnx")
        description = {
            "Global": {"model_name": name},
            "PreProcess": {"transform_ops": operations},
            "PostProcess": decoding,
        }
        (root / name / "inference.yml").write_text(yaml.safe_dump(description, allow_unicode=True), "utf-8")
    return root


@pytest.fixture(scope="module")
def paddle_engine(model_dir: Path) -> Iterator[OcrEngine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INFERQ_OCR_BACKEND", "paddleocr")
        patch.setenv("INFERQ_OCR_DEVICE", "onnxruntime")
        patch.setenv("INFERQ_OCR_MODEL_DIR", str(model_dir))
        engine = OcrEngine()
        info = engine.load()
    assert info.name == "paddleocr"
    assert info.model == "PP-OCRv6_small_det+PP-OCRv6_small_rec"
    assert info.device == "cpu (onnxruntime)"
    yield engine
    engine.close()


@with_paddleocr
def test_both_backends_say_the_same_of_a_page(
    paddle_engine: OcrEngine,
    engine: OcrEngine,
    make_context: Callable[..., Context],
    invoice: Sample,
    notice: Sample,
) -> None:
    for page in (invoice, notice):
        by_paddle = paddle_engine.run(ocr_task(), make_context(page.path))
        by_rapid = engine.run(ocr_task(), make_context(page.path))
        assert isinstance(by_paddle, OcrOutput)
        assert by_paddle.text.splitlines() == page.lines
        assert by_paddle.text == by_rapid.text
        for one, other in zip(by_paddle.pages[0].lines, by_rapid.pages[0].lines, strict=True):
            for (x0, y0), (x1, y1) in zip(one.box, other.box, strict=True):
                assert abs(x0 - x1) < 14
                assert abs(y0 - y1) < 14


@with_paddleocr
def test_pages_read_together_give_what_each_gives_alone(paddle_engine: OcrEngine, heading: Sample) -> None:
    page = np.asarray(heading.image)
    pages = [page, np.full((200, 300, 3), 255, np.uint8), page[100:, 200:]]
    backend = paddle_engine._backend
    alone = [backend.read([page])[0] for page in pages]
    assert [len(lines) > 0 for lines in alone] == [True, False, True]
    assert backend.read(pages) == alone


@with_paddleocr
def test_a_blank_page_has_no_lines(
    paddle_engine: OcrEngine, make_context: Callable[..., Context], tmp_path: Path
) -> None:
    Image.new("L", (300, 200), 255).save(tmp_path / "a.png")
    output = paddle_engine.run(ocr_task(), make_context(tmp_path / "a.png"))
    assert output.text == ""
    assert output.pages[0].lines == ()


@with_paddleocr
def test_paddle_warms_up(paddle_engine: OcrEngine) -> None:
    paddle_engine.warm_up()


@with_paddleocr
def test_a_gpu_that_onnxruntime_does_not_have_is_an_error(model_dir: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(InstallationError, match="gpu:1") as caught:
        backend(model_dir, device="cuda:1", computes_with="onnxruntime")
    assert caught.value.code == "device_unavailable"


@with_paddleocr
def test_missing_paddlepaddle_is_said(model_dir: Path) -> None:
    if importlib.util.find_spec("paddle") is not None:
        pytest.skip("paddlepaddle is installed")
    with pytest.raises(InstallationError, match="INFERQ_OCR_DEVICE=onnxruntime"):
        backend(model_dir, device="cpu", computes_with=None)


@with_paddleocr
@with_paddle
def test_a_gpu_that_paddle_does_not_have_is_an_error(model_dir: Path) -> None:
    import paddle

    if paddle.device.is_compiled_with_cuda():
        pytest.skip("this paddlepaddle has CUDA")
    with pytest.raises(InstallationError, match="finds no such GPU"):
        backend(model_dir, device="gpu", computes_with=None)


def test_missing_paddleocr_is_said(model_dir: Path) -> None:
    if importlib.util.find_spec("paddleocr") is not None:
        pytest.skip("paddleocr is installed")
    with pytest.raises(InstallationError, match="INFERQ_OCR_BACKEND=rapidocr") as caught:
        backend(model_dir, device="cpu", computes_with="onnxruntime")
    assert caught.value.code == "engine_not_installed"


def test_a_folder_without_the_models_is_said(tmp_path: Path) -> None:
    with pytest.raises(InstallationError, match="no text_detection and no text_recognition model") as caught:
        backend(tmp_path, device="cpu", computes_with=None)
    assert caught.value.code == "bad_model_dir"


def test_two_models_for_one_role_are_not_guessed_between(tmp_path: Path) -> None:
    for name in ("small_det", "medium_det"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "inference.yml").write_text(f"Global: {{model_name: {name}}}")
    with pytest.raises(InstallationError, match="medium_det and small_det"):
        backend(tmp_path, device="cpu", computes_with=None)


@with_paddleocr
def test_a_page_may_have_any_number_of_boxes_and_any_length(paddle_engine: OcrEngine) -> None:
    found_text = np.zeros((1, 800, 1000), np.float32)
    for row in range(40):
        for column in range(30):
            found_text[0, 20 * row + 4 : 20 * row + 14, 33 * column + 4 : 33 * column + 24] = 1
    pipeline = paddle_engine._backend._ocr.paddlex_pipeline  # type: ignore[attr-defined]
    boxes, _ = pipeline.text_det_model.post_op([found_text[None]], [np.array([800, 1000, 1.0, 1.0])])
    assert len(boxes[0]) == 1200
    assert pipeline.get_text_det_params()["max_side_limit"] > 65_500


class StandIn:
    """In paddleocr's place: keeps what it is asked, and reads the same four lines off every page."""

    asked: ClassVar[dict[str, Any]] = {}
    predicted: ClassVar[dict[str, Any]] = {}
    error: ClassVar[Exception | None] = None
    found: ClassVar[dict[str, Any]] = {
        "rec_polys": [
            np.array([[116, 36], [216, 36], [216, 56], [116, 56]], np.int16),
            np.array([[116, 136], [216, 136], [216, 156], [116, 156]], np.int16),
            np.array([[316, 36], [336, 36], [336, 136], [316, 136]], np.int16),
            np.array([[16, 16], [26, 16], [26, 26], [16, 26]], np.int16),
        ],
        "rec_texts": ["upright", "on its head", "sideways", " "],
        "rec_scores": [0.9, 1.0000001, np.float32(0.7), 0.0],
        "textline_orientation_angles": [0, 1, 0, 0],
    }

    def __init__(self, **asked: Any) -> None:
        StandIn.asked = asked
        detector = SimpleNamespace(post_op=SimpleNamespace(max_candidates=1000))
        pipeline = SimpleNamespace(text_det_max_side_limit=4000, text_det_model=detector)
        self.paddlex_pipeline = SimpleNamespace(_pipeline=pipeline)
        if "fail" in str(asked.get("text_detection_model_name")):
            raise RuntimeError("bad weights")

    def predict(self, page: np.ndarray, **asked: Any) -> list[dict[str, Any]]:
        if StandIn.error:
            raise StandIn.error
        StandIn.predicted = {"shape": page.shape, **asked}
        return [self.found]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    monkeypatch.setattr(StandIn, "error", None)
    monkeypatch.setitem(sys.modules, "paddleocr", SimpleNamespace(PaddleOCR=StandIn))
    cuda = SimpleNamespace(device_count=lambda: 2)
    device = SimpleNamespace(is_compiled_with_cuda=lambda: True, cuda=cuda)
    monkeypatch.setitem(sys.modules, "paddle", SimpleNamespace(device=device, __version__="0"))
    monkeypatch.setattr("inferq.consumers.ocr.paddle.version", lambda _: "0")
    monkeypatch.setenv("PADDLE_PDX_DISABLE_MODEL_SOURCE_CHECK", "True")
    return StandIn


def make_models(folder: Path, *names: str, file: str = "inference.json") -> Path:
    for name in names:
        (folder / name).mkdir()
        (folder / name / "inference.yml").write_text(f"Global: {{model_name: {name}}}")
        (folder / name / file).touch()
    return folder


def test_boxes_begin_where_the_text_begins(stand_in: type[StandIn], tmp_path: Path) -> None:
    models = make_models(tmp_path, "s_det", "s_rec", "s_textline_ori")
    lines = backend(models, device="cpu", computes_with="cpu").read([np.zeros((400, 600, 3), np.uint8)])[0]
    assert stand_in.asked["use_textline_orientation"] is True
    assert {line.text: line.box[0] for line in lines} == {
        "upright": (100, 20),
        "on its head": (200, 140),
        "sideways": (320, 20),
    }
    assert {line.text: line.box[1] for line in lines}["sideways"] == (320, 120)
    assert lines[1].score == 1


def test_lines_of_several_pages_are_recognized_together_and_return_to_their_pages(
    stand_in: type[StandIn], tmp_path: Path
) -> None:
    loaded = backend(
        make_models(tmp_path, "s_det", "s_rec", "s_textline_ori"), device="gpu", computes_with=None
    )
    assert loaded.batch_size == 8
    wide = [[10, 10], [90, 10], [90, 20], [10, 20]]
    narrow = [[10, 50], [30, 50], [30, 60], [10, 60]]
    found = iter([[wide, narrow], [], [narrow]])
    read: list[list[tuple[int, ...]]] = []

    def recognize(lines: list[np.ndarray], **_: Any) -> list[dict[str, Any]]:
        read.append([line.shape[:2] for line in lines])
        return [{"rec_text": f"{line.shape[1]} {line[0, 0, 0]}", "rec_score": 0.9} for line in lines]

    loaded._ocr.paddlex_pipeline._pipeline = SimpleNamespace(
        use_textline_orientation=True,
        get_text_det_params=lambda side, kind: {"limit_side_len": side, "limit_type": kind},
        text_det_model=lambda images, **_: [{"dt_polys": next(found)} for _ in images],
        _sort_boxes=lambda boxes: boxes,
        _crop_by_polys=lambda image, boxes: [
            image[box[0][1] : box[2][1], box[0][0] : box[1][0]] for box in boxes
        ],
        textline_orientation_model=lambda _: [{"class_ids": [way]} for way in (0, 1, 1)],
        rotate_image=lambda lines, flips: [
            np.rot90(line, 2 * flip) for line, flip in zip(lines, flips, strict=True)
        ],
        text_rec_model=recognize,
    )
    pages = [np.full((400, 600, 3), shade, np.uint8) for shade in (1, 2, 3)]
    lines = loaded.read(pages)
    assert read == [[(10, 20), (10, 20), (10, 80)]]
    assert [[line.text for line in page] for page in lines] == [["80 1", "20 1"], [], ["20 3"]]
    # The second and the third line stand on their heads.
    assert [[line.box[0] < line.box[2] for line in page] for page in lines] == [[True, False], [], [False]]


def test_large_pages_are_searched_at_a_smaller_scale(stand_in: type[StandIn], tmp_path: Path) -> None:
    models = make_models(tmp_path, "s_det", "s_rec")
    backend(models, device="cpu", computes_with="cpu").read([np.zeros((4000, 5000, 3), np.uint8)])
    assert stand_in.asked["use_textline_orientation"] is False
    assert stand_in.predicted["text_det_limit_type"] == "max"
    assert stand_in.predicted["text_det_limit_side_len"] == pytest.approx(2500, rel=0.01)


def test_the_gpu_asked_for_is_the_gpu_used(stand_in: type[StandIn], tmp_path: Path) -> None:
    models = make_models(tmp_path, "s_det", "s_rec")
    assert backend(models, device="cuda:1", computes_with=None).info.device == "gpu:1"
    assert stand_in.asked["device"] == "gpu:1"
    assert backend(models, device="cpu", computes_with="gpu").info.device == "gpu:0"
    assert backend(models, device="cuda:1", computes_with="cpu").info.device == "cpu"
    with pytest.raises(InstallationError, match="gpu:2"):
        backend(models, device="cuda:2", computes_with=None)


@pytest.mark.parametrize(
    ("file", "new"), [("inference.pdmodel", {"enable_new_ir": False}), ("inference.json", {})]
)
def test_older_weights_run_on_paddles_older_representation(
    stand_in: type[StandIn], tmp_path: Path, file: str, new: dict[str, bool]
) -> None:
    backend(make_models(tmp_path, "s_det", "s_rec", file=file), device="cpu", computes_with=None)
    static = stand_in.asked["engine_config"]["paddle_static"]
    assert static == {"cpu_threads": 2, "run_mode": "mkldnn", **new}


def test_a_gpu_out_of_memory_is_worth_another_attempt(stand_in: type[StandIn], tmp_path: Path) -> None:
    loaded = backend(make_models(tmp_path, "s_det", "s_rec"), device="gpu", computes_with=None)
    stand_in.error = MemoryError("ResourceExhaustedError: Out of memory error on GPU 0.")
    with pytest.raises(TransientFailure) as caught:
        loaded.read([np.zeros((40, 60, 3), np.uint8)])
    assert caught.value.code == "out_of_memory"
    stand_in.error = ValueError("else")
    with pytest.raises(ValueError, match="else"):
        loaded.read([np.zeros((40, 60, 3), np.uint8)])


def test_weights_that_do_not_load_are_said(stand_in: type[StandIn], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    with pytest.raises(InstallationError, match="bad weights") as caught:
        backend(make_models(tmp_path, "fail_det", "s_rec"), device="cpu", computes_with="onnxruntime")
    assert caught.value.code == "engine_not_loadable"


def backend(model_dir: Path, *, device: str, computes_with: str | None) -> PaddleBackend:
    return PaddleBackend(
        device=device,
        computes_with=computes_with,  # type: ignore[arg-type]
        threads=2,
        model_dir=model_dir,
        detect_megapixels=5.0,
    )
