"""Files that cost too much to decode, or crash their decoder, cost only themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from inferq.consumers.engine import TaskAborted
from inferq.consumers.media.decoder import Decoder
from inferq.consumers.ocr.images import open_document
from inferq.schemas import InferqError, InvalidTask, TransientFailure
from tests.ocr.conftest import PAGES
from tests.ocr.pdfs import one_page, stream, write_pdf

ROOT = Path(__file__).parents[2]
MakeDecoder = Callable[[str], Decoder]


@pytest.fixture(scope="module")
def make_decoder() -> Iterator[MakeDecoder]:
    """Decoders with a second for each page, by their opener."""
    made: dict[str, Decoder] = {}

    def make(opener: str) -> Decoder:
        if opener not in made:
            arguments = {"max_pixels": 2_000_000, "dpi": 72} if "images" in opener else {}
            made[opener] = Decoder(opener, arguments, max_pixels=2_000_000, page_seconds=1)
        return made[opener]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        yield make
    for decoder in made.values():
        decoder.close()


@pytest.fixture
def documents(make_decoder: MakeDecoder) -> Decoder:
    return make_decoder("inferq.consumers.ocr.images:open_with")


@pytest.fixture
def bad(make_decoder: MakeDecoder) -> Decoder:
    return make_decoder("tests.ocr.openers:Bad")


def nested_forms(path: Path) -> Path:
    """A PDF of 2 kB that draws a square 10^8 times."""
    objects: dict[int, str | bytes] = {
        number: stream(
            b"/A Do " * 10,
            f"/Type /XObject /Subtype /Form /BBox [0 0 9 9] /Resources << /XObject << /A {number + 1} 0 R >> >>",
        )
        for number in range(6, 14)
    }
    objects[14] = stream(b"0 0 9 9 re f", "/Type /XObject /Subtype /Form /BBox [0 0 9 9]")
    return one_page(path, b"/A Do", resources="/XObject << /A 6 0 R >>", more=objects)


def test_another_process_gives_the_same_page(documents: Decoder) -> None:
    path = PAGES / "notice.png"
    with open_document(path) as here, documents.open(path) as there:
        assert there.page_count == 1
        assert (there.page(1) == here.page(1)).all()


def test_a_small_pdf_that_takes_hours_is_refused_and_not_retried(documents: Decoder, tmp_path: Path) -> None:
    with documents.open(nested_forms(tmp_path / "a.pdf")) as document:
        with pytest.raises(InvalidTask, match=r"page 1 (takes|needs) more than") as caught:
            document.page(1)
    assert caught.value.code == "decoding_limit"


@pytest.mark.parametrize(
    ("deed", "error", "code", "said"),
    [
        ("hang", InvalidTask, "decoding_limit", "more than 1 s"),
        ("eat", InvalidTask, "decoding_limit", "MiB to decode"),
        ("crash", InvalidTask, "decoding_limit", "SIGSEGV"),
        ("fail", TransientFailure, "engine_error", "the decoder process failed"),
        ("vanish", TransientFailure, "out_of_memory", "out of memory"),
    ],
)
def test_a_bad_page_does_not_cost_the_others(
    bad: Decoder, tmp_path: Path, deed: str, error: type[InferqError], code: str, said: str
) -> None:
    (tmp_path / "a").write_text(deed)
    with bad.open(tmp_path / "a") as document:
        assert document.page(1)[0, 0, 0] == 1
        with pytest.raises(error, match=said) as caught:
            document.page(2)
        assert caught.value.code == code
        assert document.page(3)[0, 0, 0] == 3


def test_the_pages_of_a_file_share_its_cpu_time(bad: Decoder, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("hang")
    with bad.open(tmp_path / "a", seconds=1.5) as document:
        with pytest.raises(InvalidTask, match="more than 1 s"):
            document.page(2)
        with pytest.raises(InvalidTask, match="has used up the CPU time") as caught:
            document.page(3)
    assert caught.value.code == "decoding_limit"


def test_decoding_ends_when_the_task_is_cancelled(bad: Decoder, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("hang")

    def cancelled() -> None:
        raise TaskAborted

    before = set(psutil.Process().children(recursive=True))
    with bad.open(tmp_path / "a", check=lambda: None) as document:
        document._check = cancelled
        with pytest.raises(TaskAborted):
            document.page(2)
    # Its process ends with its server, before its second of CPU time is over.
    _, alive = psutil.wait_procs(set(psutil.Process().children(recursive=True)) - before, timeout=60)
    assert not alive
    with bad.open(tmp_path / "a") as document:
        assert document.page(1)[0, 0, 0] == 1


def test_nothing_of_an_earlier_file_reaches_the_next(documents: Decoder, tmp_path: Path) -> None:
    locked = f"<< /Filter /Standard /V 1 /R 2 /Length 40 /P -64 /O <{'01' * 32}> /U <{'02' * 32}> >>"
    first = one_page(tmp_path / "a.pdf", more={6: locked}, trailer="/Encrypt 6 0 R /ID [<00> <00>]")
    second = write_pdf(
        tmp_path / "b.pdf",
        {1: "<< /Type /Catalog /Pages 2 0 R >>", 2: "<< /Type /Pages /Kids [] /Count 0 >>"},
        with_table=True,
    )
    for path, code in ((first, "encrypted_pdf"), (second, "truncated_image")):
        with pytest.raises(InvalidTask) as caught:
            documents.open(path)
        assert caught.value.code == code


def test_a_missing_file_is_no_fault_of_the_task(documents: Decoder, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        documents.open(tmp_path / "gone.png")
