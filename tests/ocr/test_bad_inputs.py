"""Whatever else arrives is refused, early and with a reason."""

from __future__ import annotations

import resource
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from inferq.consumers.ocr.images import Limits, open_document
from inferq.schemas import InvalidTask
from tests.ocr.pdfs import one_page, stream


def refusal(path: Path, limits: Limits | None = None) -> InvalidTask:
    with pytest.raises(InvalidTask) as caught:
        with open_document(path, limits or Limits()) as document:
            for number in range(1, document.page_count + 1):
                document.page(number)
    return caught.value


@pytest.mark.parametrize(
    ("name", "content", "code", "said"),
    [
        ("empty.png", b"", "empty_file", "empty"),
        ("text.png", b"this is no picture\n", "not_an_image", "but text"),
        ("chinese.jpg", "这不是图片。".encode() * 100, "not_an_image", "but text"),
        ("error.jpg", b"<!DOCTYPE html><html><body>404</body></html>", "not_an_image", "HTML page"),
        ("login.png", b"\xef\xbb\xbf\n <html lang='en'>", "not_an_image", "HTML page"),
        ("error.json", b'{"error": "denied"}', "not_an_image", "JSON"),
        ("denied.png", b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', "not_an_image", "XML"),
        ("a.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not_an_image", "SVG"),
        ("b.png", b"<?xml version='1.0'?>\n<!-- x -->\n<svg width='1'/>", "not_an_image", "SVG"),
        ("a.docx", b"PK\x03\x04" + bytes(40), "not_an_image", "Office"),
        ("a.doc", b"\xd0\xcf\x11\xe0" + bytes(40), "not_an_image", "Office"),
        ("a.heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "not_an_image", "HEIC"),
        ("a.mp4", b"\0\0\0\x18ftypisom\0\0\0\0", "not_an_image", "video"),
        ("a.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n", "not_an_image", "PostScript"),
        ("zeros", bytes(5000), "not_an_image", "zero bytes"),
        ("noise", bytes(range(128, 256)) * 20, "not_an_image", "unknown kind"),
        ("signature.png", b"\x89PNG\r\n\x1a\n", "truncated_image", "PNG"),
        ("signature.jpg", b"\xff\xd8\xff\xe0\x00\x10JF", "truncated_image", "JPEG"),
        ("signature.tiff", b"II*\0\x08\0\0\0", "truncated_image", ""),
        ("signature.gif", b"GIF89a", "truncated_image", ""),
        ("broken.pdf", b"%PDF-1.7\nnothing more", "truncated_image", "PDF"),
    ],
)
def test_no_image_is_refused_for_what_it_is(
    tmp_path: Path, name: str, content: bytes, code: str, said: str
) -> None:
    (tmp_path / name).write_bytes(content)
    error = refusal(tmp_path / name)
    assert error.code == code
    assert said in error.message


def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 255, (200, 300, 3), np.uint8))


@pytest.mark.parametrize("options", [{"progressive": True}, {"restart_marker_blocks": 5}])
@pytest.mark.parametrize("missing", [3, 40, 2000, 9000])
def test_a_jpeg_that_lacks_more_than_its_end_marker_is_refused(
    tmp_path: Path, options: dict[str, int], missing: int
) -> None:
    noise().save(tmp_path / "a.jpg", **options)
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(data[:-missing])
    assert refusal(tmp_path / "a.jpg").code == "truncated_image"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP", "AVIF", "JPEG2000"])
@pytest.mark.parametrize("share", [0.98, 0.5, 0.2])
def test_a_picture_cut_short_is_refused(tmp_path: Path, kind: str, share: float) -> None:
    path = tmp_path / "a"
    noise().save(path, format=kind)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    assert refusal(path).code == "truncated_image"


def test_a_damaged_length_that_asks_for_exabytes_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "a"
    noise().save(path, format="JPEG2000")
    data = bytearray(path.read_bytes())
    assert data[36:40] == b"jp2h"
    data[35] = 1  # the length follows in 64 bits, says that, and other data does
    path.write_bytes(data)
    assert refusal(path).code == "truncated_image"


def png_claiming(width: int, height: int) -> bytes:
    """A well-formed PNG that says it has that many pixels, and holds next to none."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100)))
        + chunk(b"IEND", b"")
    )  # fmt: skip


@pytest.mark.parametrize(("width", "height"), [(40_000, 25_000), (65_000, 65_000), (2**31 - 1, 2**31 - 1)])
def test_a_picture_of_a_gigapixel_is_refused_before_it_is_decoded(
    tmp_path: Path, width: int, height: int
) -> None:
    (tmp_path / "bomb.png").write_bytes(png_claiming(width, height))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    error = refusal(tmp_path / "bomb.png")
    assert error.code == "image_too_large"
    assert f"{width}×{height}" in error.message
    assert "100 million" in error.message
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kilobytes


@pytest.mark.parametrize(("width", "height"), [(60_000, 1), (1, 60_000), (90_000, 2000), (20_001, 100)])
def test_a_picture_of_an_absurd_shape_is_refused(tmp_path: Path, width: int, height: int) -> None:
    (tmp_path / "a.png").write_bytes(png_claiming(width, height))
    assert refusal(tmp_path / "a.png", Limits(max_pixels=10**9)).code == "image_too_large"


def test_a_later_page_that_is_too_large_is_refused_on_its_own(tmp_path: Path) -> None:
    Image.new("1", (50, 50)).save(
        tmp_path / "a.tiff", save_all=True, append_images=[Image.new("1", (2000, 1000))], compression="group4"
    )
    with open_document(tmp_path / "a.tiff", Limits(max_pixels=10_000)) as document:
        assert document.page(1).shape == (50, 50, 3)
        with pytest.raises(InvalidTask, match="page 2 has 2000×1000 pixels") as caught:
            document.page(2)
    assert caught.value.code == "image_too_large"


def tiff_of(frames: int) -> bytes:
    """A TIFF of so many grey pages of one pixel, which they share."""
    tags = ((256, 3, 1, 1), (257, 3, 1, 1), (258, 3, 1, 8), (262, 3, 1, 1), (273, 4, 1, 8), (279, 4, 1, 1))
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    size = len(directory) + 4
    offsets = [12 + size * number for number in range(1, frames)] + [0]
    return struct.pack("<4sII", b"II*\0", 12, 0) + b"".join(directory + struct.pack("<I", o) for o in offsets)


def test_a_tiff_of_many_frames_is_counted_no_further_than_that_takes_seconds(tmp_path: Path) -> None:
    (tmp_path / "a.tiff").write_bytes(tiff_of(10_000))
    with open_document(tmp_path / "a.tiff") as document:
        assert document.page_count == 10_000
        assert document.page(1).shape == (1, 1, 3)
    (tmp_path / "b.tiff").write_bytes(tiff_of(40_000))
    begun = time.process_time()
    error = refusal(tmp_path / "b.tiff")
    assert time.process_time() - begun < 10
    assert error.code == "too_many_pages"
    assert "more than 10000 frames" in error.message


def test_a_huge_picture_inside_a_pdf_is_refused(tmp_path: Path) -> None:
    Image.new("1", (3000, 1000)).save(tmp_path / "a.pdf", resolution=3000)
    error = refusal(tmp_path / "a.pdf", Limits(max_pixels=1_000_000))
    assert error.code == "image_too_large"
    assert "3000×1000" in error.message


def test_a_pdf_without_pages_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(EMPTY_PDF)
    error = refusal(tmp_path / "a.pdf")
    assert error.code == "truncated_image"
    assert "no pages" in error.message


def test_a_pdf_behind_a_password_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(ENCRYPTED_PDF)
    error = refusal(tmp_path / "a.pdf")
    assert error.code == "encrypted_pdf"
    assert "password" in error.message


def test_a_pdf_for_the_owner_of_a_certificate_is_refused(tmp_path: Path) -> None:
    locked = "<< /Filter /Adobe.PubSec /SubFilter /adbe.pkcs7.s4 /V 2 /Length 128 /Recipients [<30820100>] >>"
    path = one_page(
        tmp_path / "a.pdf", more={6: locked}, trailer="/Encrypt 6 0 R /ID [<00112233> <00112233>]"
    )
    error = refusal(path)
    assert error.code == "encrypted_pdf"
    assert "certificate" in error.message


def test_an_xfa_form_is_refused_instead_of_its_page_that_asks_to_wait(tmp_path: Path) -> None:
    path = one_page(
        tmp_path / "a.pdf",
        b"BT /F 10 Tf 72 720 Td (Please wait...) Tj ET",
        catalog="/AcroForm << /Fields [] /XFA 6 0 R >> /NeedsRendering true",
        more={6: stream(b"<xdp/>")},
    )
    error = refusal(path)
    assert error.code == "xfa_form"
    assert "XFA" in error.message


def test_a_page_left_blank_by_a_missing_font_is_refused(tmp_path: Path) -> None:
    fonts: dict[int, str | bytes] = {
        6: "<< /Type /Font /Subtype /Type0 /BaseFont /Elsewhere /Encoding /UniGB-UCS2-H /DescendantFonts [7 0 R] >>",
        7: "<< /Type /Font /Subtype /CIDFontType2 /BaseFont /Elsewhere /DW 1000 /FontDescriptor 8 0 R "
        "/CIDSystemInfo << /Registry (Adobe) /Ordering (GB1) /Supplement 2 >> >>",
        8: "<< /Type /FontDescriptor /FontName /Elsewhere /Flags 4 /FontBBox [0 -200 1000 900] /StemV 80 >>",
    }
    # Characters for private use, which no font of any machine has.
    text = b"BT /F 24 Tf 72 700 Td <E123E124> Tj ET"
    error = refusal(one_page(tmp_path / "a.pdf", text, resources="/Font << /F 6 0 R >>", more=fonts))
    assert error.code == "missing_font"
    assert "Elsewhere" in error.message


def test_a_blank_page_is_no_fault(tmp_path: Path) -> None:
    one_page(tmp_path / "a.pdf", b"BT /F 24 Tf 72 700 Td ( ) Tj 3 Tr (hidden) Tj ET")
    with open_document(tmp_path / "a.pdf") as document:
        assert (document.page(1) == 255).all()


@pytest.mark.parametrize(
    ("at", "value", "said"),
    [(4, 12, "12 bits per sample"), (1, 0xC3, "lossless")],
)
def test_a_sound_jpeg_of_an_unsupported_variant_is_not_called_damaged(
    tmp_path: Path, at: int, value: int, said: str
) -> None:
    noise().save(tmp_path / "a.jpg")
    data = bytearray((tmp_path / "a.jpg").read_bytes())
    data[data.index(b"\xff\xc0") + at] = value
    (tmp_path / "a.jpg").write_bytes(data)
    error = refusal(tmp_path / "a.jpg")
    assert error.code == "unsupported_image"
    assert said in error.message


@pytest.mark.parametrize(
    ("tag", "value"), [(259, 12_345), (262, 32_803)], ids=["compression", "colour filter"]
)
def test_a_sound_tiff_of_an_unsupported_variant_is_not_called_damaged(
    tmp_path: Path, tag: int, value: int
) -> None:
    data = bytearray(tiff_of(1))
    entry = next(at for at in range(14, len(data), 12) if struct.unpack_from("<H", data, at)[0] in {tag, 258})
    struct.pack_into("<HHII", data, entry, tag, 3, 1, value)
    (tmp_path / "a.tiff").write_bytes(data)
    assert refusal(tmp_path / "a.tiff").code == "unsupported_image"


def test_an_avif_beyond_its_decoders_limits_is_called_too_large(tmp_path: Path) -> None:
    noise().save(tmp_path / "a.avif")
    data = bytearray((tmp_path / "a.avif").read_bytes())
    struct.pack_into(">II", data, data.index(b"ispe") + 8, 40_000, 20_000)
    (tmp_path / "a.avif").write_bytes(data)
    error = refusal(tmp_path / "a.avif", Limits(max_pixels=10**9))
    assert error.code == "image_too_large"
    assert "40000×20000" in error.message


def test_a_missing_file_is_no_fault_of_the_task(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_document(tmp_path / "gone.png")


EMPTY_PDF = b"""%PDF-1.4
1 0 obj
<< /Type /Catalog /Pages 2 0 R >>
endobj
2 0 obj
<< /Type /Pages /Kids [] /Count 0 >>
endobj
trailer
<< /Root 1 0 R /Size 3 >>
%%EOF
"""

ENCRYPTED_PDF = b"""%PDF-1.4
1 0 obj
<< /Type /Catalog /Pages 2 0 R >>
endobj
2 0 obj
<< /Type /Pages /Kids [3 0 R] /Count 1 >>
endobj
3 0 obj
<< /Type /Page /Parent 2 0 R /MediaBox [0 0 72 72] >>
endobj
4 0 obj
<< /Filter /Standard /V 1 /R 2 /Length 40 /P -64
/O <0101010101010101010101010101010101010101010101010101010101010101>
/U <0202020202020202020202020202020202020202020202020202020202020202> >>
endobj
trailer
<< /Root 1 0 R /Encrypt 4 0 R /Size 5 /ID [<00> <00>] >>
%%EOF
"""


def _specimens() -> list[bytes]:
    import io

    found = []
    for kind in ("PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP", "JPEG2000", "AVIF", "PDF"):
        buffer = io.BytesIO()
        noise().resize((40, 30)).save(buffer, format=kind)
        found.append(buffer.getvalue())
    return found


SPECIMENS = _specimens()


@given(data=st.data())
@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_anywhere_gives_a_page_or_a_refusal(tmp_path: Path, data: st.DataObject) -> None:
    specimen = bytearray(data.draw(st.sampled_from(SPECIMENS)))
    for _ in range(data.draw(st.integers(1, 6))):
        where = data.draw(st.one_of(st.integers(0, min(200, len(specimen) - 1)),
                                    st.integers(0, len(specimen) - 1)))  # fmt: skip
        specimen[where] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged"
    path.write_bytes(specimen)
    try:
        with open_document(path, Limits(max_pixels=4_000_000)) as document:
            page = document.page(1)
    except InvalidTask as error:
        assert error.code in {
            "empty_file", "not_an_image", "truncated_image", "image_too_large", "encrypted_pdf",
            "unsupported_image", "xfa_form", "missing_font",
        }  # fmt: skip
    else:
        assert page.ndim == 3
        assert page.size > 0
