"""Every kind of picture and document that is read."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pypdfium2 as pdfium
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageDraw, ImageOps

from inferq.consumers.ocr.images import Limits, open_document
from tests.ocr.pdfs import one_page

SIZE = (120, 80)


def picture(mode: str = "RGB") -> Image.Image:
    """Red at the top left, green at the top right, blue at the bottom left, white at the bottom right."""
    image = Image.new("RGB", SIZE, "white")
    pen = ImageDraw.Draw(image)
    pen.rectangle((0, 0, 59, 39), fill=(255, 0, 0))
    pen.rectangle((60, 0, 119, 39), fill=(0, 255, 0))
    pen.rectangle((0, 40, 59, 79), fill=(0, 0, 255))
    return image.convert(mode)


def corners(page: NDArray[np.uint8]) -> list[tuple[int, ...]]:
    """The colours at the middle of the four quarters, rounded to 0 or 255."""
    height, width = page.shape[:2]
    spots = ((height // 4, width // 4), (height // 4, 3 * width // 4),
             (3 * height // 4, width // 4), (3 * height // 4, 3 * width // 4))  # fmt: skip
    return [tuple(int(value > 127) * 255 for value in page[spot]) for spot in spots]


COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]


def only_page(path: Path, limits: Limits | None = None) -> NDArray[np.uint8]:
    with open_document(path, limits or Limits()) as document:
        assert document.page_count == 1
        page = document.page(1)
    assert page.dtype == np.uint8
    assert page.ndim == 3
    assert page.shape[2] == 3
    assert page.flags.c_contiguous
    return page


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP", "JPEG2000", "AVIF", "PPM"])
def test_every_kind_of_file_is_known_by_its_content(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "picture.txt"
    picture().save(path, format=kind)
    page = only_page(path)
    assert page.shape == (80, 120, 3)
    assert corners(page) == COLOURS


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_page_is_turned_upright_as_exif_says(tmp_path: Path, kind: str, orientation: int) -> None:
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    stored = picture().transpose(undo[orientation]) if orientation in undo else picture()
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned"
    stored.save(path, format=kind, exif=exif)
    page = only_page(path)
    assert page.shape == (80, 120, 3)
    assert corners(page) == COLOURS


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_means_nothing_is_passed_over(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture().save(tmp_path / "a.jpg", exif=exif)
    assert corners(only_page(tmp_path / "a.jpg")) == COLOURS


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_page_is_turned_as_pillow_would(tmp_path: Path, kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture().save(tmp_path / "a", format=kind, exif=exif)
    with Image.open(tmp_path / "a") as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    assert (only_page(tmp_path / "a") == expected).all()


def exif_block(tag: int, kind: int, value: bytes) -> bytes:
    """An EXIF block of orientation 6 and one more tag, whose value has this type (TIFF 6.0, section 2)."""
    entries = sorted([struct.pack("<HHII", 0x0112, 3, 1, 6), struct.pack("<HHI4s", tag, kind, 1, value)])
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + b"".join(entries) + bytes(4)


@pytest.mark.parametrize(
    ("tag", "kind", "value"),
    [(0x0128, 2, b"2"), (0x011A, 2, b"7"), (0x013B, 11, bytes(4)), (0x013B, 5, bytes(4)),
     (0x8769, 9, b"\xff" * 4), (0x8825, 2, b"x"), (0xA005, 16, bytes(4))],
)  # fmt: skip
@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP"])
def test_a_photo_with_an_odd_exif_tag_is_turned_all_the_same(
    tmp_path: Path, format_: str, tag: int, kind: int, value: bytes
) -> None:
    picture().transpose(Image.Transpose.ROTATE_90).save(
        tmp_path / "a", format=format_, exif=exif_block(tag, kind, value)
    )
    page = only_page(tmp_path / "a")
    assert page.shape == (80, 120, 3)
    assert corners(page) == COLOURS


@pytest.mark.parametrize(
    "block", [b"no TIFF header", b"I", b"II*\0\x08\0\0\0\x05", b"II*\0\xff\xff\xff\xff", b"II+\0", b"x" * 40]
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_an_exif_block_that_cannot_be_read_is_passed_over(tmp_path: Path, kind: str, block: bytes) -> None:
    picture().save(tmp_path / "a", format=kind, exif=b"Exif\0\0" + block)
    assert corners(only_page(tmp_path / "a")) == COLOURS


def test_an_inverted_cmyk_photo_is_turned_too(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.eval(picture("CMYK"), lambda value: 255 - value).save(buffer, format="JPEG", exif=exif)
    data = buffer.getvalue()
    start = data.index(b"\xff\xee")
    end = start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")
    (tmp_path / "plain.jpg").write_bytes(data[:start] + data[end:])
    red, green, blue, white = COLOURS
    assert corners(only_page(tmp_path / "plain.jpg")) == [blue, red, white, green]


def test_what_is_transparent_is_white(tmp_path: Path) -> None:
    image = picture("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 60, 40))
    image.save(tmp_path / "rgba.png")
    assert corners(only_page(tmp_path / "rgba.png"))[0] == (255, 255, 255)
    grey = Image.new("LA", SIZE, (0, 0))
    grey.paste((0, 255), (60, 0, 120, 80))
    grey.save(tmp_path / "la.png")
    page = only_page(tmp_path / "la.png")
    assert (page[:, :60] == 255).all()
    assert (page[:, 60:] == 0).all()


@pytest.mark.parametrize(
    ("inks", "ground"),
    [([255], 0), ([230], 0), ([0], 255), ([120], 255), ([255, 0], 128)],
    ids=["white", "light", "black", "grey", "white and black"],
)
def test_the_ground_of_transparent_pixels_contrasts_with_what_is_visible(
    tmp_path: Path, inks: list[int], ground: int
) -> None:
    image = Image.new("RGBA", SIZE, (255, 255, 255, 0))
    for number, ink in enumerate(inks):
        image.paste((ink, ink, ink, 255), (20 + 40 * number, 20, 40 + 40 * number, 60))
    image.save(tmp_path / "a.png")
    page = only_page(tmp_path / "a.png")
    assert (page[0, 0] == ground).all()
    assert [int(page[40, 30 + 40 * number, 0]) for number in range(len(inks))] == inks


def test_half_transparent_ink_is_blended(tmp_path: Path) -> None:
    Image.new("RGBA", SIZE, (0, 0, 0, 128)).save(tmp_path / "a.png")
    assert abs(int(only_page(tmp_path / "a.png")[0, 0, 0]) - 127) <= 1


def test_a_palette_with_a_transparent_colour(tmp_path: Path) -> None:
    image = Image.new("P", SIZE, 0)
    image.putpalette([0, 0, 0, 255, 0, 0])
    image.paste(1, (60, 0, 120, 80))
    image.save(tmp_path / "a.png", transparency=0)
    assert corners(only_page(tmp_path / "a.png")) == [(255, 255, 255), (255, 0, 0)] * 2


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_pictures_of_few_colours(tmp_path: Path, mode: str) -> None:
    black = Image.new("L", SIZE, 255)
    black.paste(0, (0, 0, 60, 80))
    black.convert(mode).save(tmp_path / "a.png")
    page = only_page(tmp_path / "a.png")
    assert (page[:, :60] == 0).all()
    assert (page[:, 60:] == 255).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("lightest", [65535, 4095])
def test_sixteen_bit_scans_keep_their_contrast(tmp_path: Path, kind: str, lightest: int) -> None:
    values = np.full((80, 120), lightest, np.uint16)
    values[:, :60] = lightest // 10
    Image.fromarray(values).save(tmp_path / "a", format=kind)
    page = only_page(tmp_path / "a")
    assert page[:, :60].max() < 60
    assert page[:, 60:].min() > 250


@pytest.mark.parametrize("mode", ["I", "F"])
def test_deep_tiffs_are_read(tmp_path: Path, mode: str) -> None:
    values = np.linspace(-5.0, 1e6, 9600).reshape(80, 120).astype(np.int32 if mode == "I" else np.float32)
    if mode == "F":
        values[0, 0] = np.nan
    Image.fromarray(values).save(tmp_path / "a.tiff")
    page = only_page(tmp_path / "a.tiff")
    assert page[1].max() < 10
    assert page[-1].min() > 240


def test_a_sixteen_bit_page_of_one_shade_is_blank(tmp_path: Path) -> None:
    Image.fromarray(np.full((80, 120), 700, np.uint16)).save(tmp_path / "a.png")
    assert (only_page(tmp_path / "a.png") == 255).all()


def test_sixteen_bit_pages_are_turned_too(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((80, 120), np.uint16)).save(tmp_path / "a.png", exif=exif)
    assert only_page(tmp_path / "a.png").shape == (120, 80, 3)


def test_cmyk_pictures(tmp_path: Path) -> None:
    picture("CMYK").save(tmp_path / "a.tiff")
    assert corners(only_page(tmp_path / "a.tiff")) == COLOURS


def test_cmyk_jpegs_with_and_without_adobes_inversion(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    picture("CMYK").save(buffer, format="JPEG", quality=95)
    adobe = buffer.getvalue()
    (tmp_path / "adobe.jpg").write_bytes(adobe)
    assert corners(only_page(tmp_path / "adobe.jpg")) == COLOURS
    # The same without Adobe's marker (APP14), for which readers take the ink as it stands.
    inverted = Image.eval(picture("CMYK"), lambda value: 255 - value)
    buffer = io.BytesIO()
    inverted.save(buffer, format="JPEG", quality=95)
    data = buffer.getvalue()
    start = data.index(b"\xff\xee")
    end = start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")
    (tmp_path / "plain.jpg").write_bytes(data[:start] + data[end:])
    assert corners(only_page(tmp_path / "plain.jpg")) == COLOURS


def test_lab_pictures_are_read_by_their_lightness(tmp_path: Path) -> None:
    spaces = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    lab = ImageCms.applyTransform(picture(), ImageCms.buildTransform(*spaces, "RGB", "LAB"))
    assert lab is not None
    lab.save(tmp_path / "a.tiff")
    assert corners(only_page(tmp_path / "a.tiff"))[3] == (255, 255, 255)


def test_each_page_of_a_tiff(tmp_path: Path) -> None:
    pages = [Image.new("L", (100 + 10 * number, 80), 50 * number) for number in range(4)]
    pages[0].save(tmp_path / "a.tiff", save_all=True, append_images=pages[1:])
    with open_document(tmp_path / "a.tiff") as document:
        assert document.page_count == 4
        for number in (3, 1, 4, 2):
            page = document.page(number)
            assert page.shape == (80, 90 + 10 * number, 3)
            assert (page == 50 * (number - 1)).all()


def test_thumbnails_in_a_tiff_are_no_pages(tmp_path: Path) -> None:
    thumbnail = Image.new("L", (20, 20))
    thumbnail.encoderinfo = {"tiffinfo": {254: 1}}
    Image.new("L", SIZE, 9).save(tmp_path / "a.tiff", save_all=True, append_images=[thumbnail])
    assert only_page(tmp_path / "a.tiff").shape == (80, 120, 3)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "AVIF"])
def test_of_an_animation_the_first_frame(tmp_path: Path, kind: str) -> None:
    frames = [picture(), Image.new("RGB", SIZE, "black")]
    frames[0].save(tmp_path / "a", format=kind, save_all=True, append_images=frames[1:], duration=100)
    assert corners(only_page(tmp_path / "a")) == COLOURS


def test_of_a_stereo_photo_the_first_view(tmp_path: Path) -> None:
    picture().save(tmp_path / "a", format="MPO", save_all=True, append_images=[Image.new("RGB", SIZE)])
    assert corners(only_page(tmp_path / "a")) == COLOURS


def make_pdf(path: Path, sizes: list[tuple[float, float]], rotation: int = 0) -> None:
    document = pdfium.PdfDocument.new()
    for width, height in sizes:
        page = document.new_page(width, height)
        if rotation:
            page.set_rotation(rotation)
    document.save(path)
    document.close()


def test_a_pdf_is_drawn_at_the_resolution_asked_for(tmp_path: Path) -> None:
    make_pdf(tmp_path / "a.pdf", [(72, 144), (144, 72)])
    with open_document(tmp_path / "a.pdf", Limits(dpi=150)) as document:
        assert document.page_count == 2
        assert document.page(1).shape == (300, 150, 3)
        assert document.page(2).shape == (150, 300, 3)
        assert (document.page(2) == 255).all()


def test_a_pdf_page_is_turned_as_it_says(tmp_path: Path) -> None:
    make_pdf(tmp_path / "a.pdf", [(72, 144)], rotation=90)
    assert only_page(tmp_path / "a.pdf", Limits(dpi=72)).shape == (72, 144, 3)


def test_a_pdf_has_its_colours_in_order(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.pdf", resolution=72, quality=95)
    assert corners(only_page(tmp_path / "a.pdf")) == COLOURS


def test_a_poster_in_pdf_is_drawn_more_coarsely(tmp_path: Path) -> None:
    make_pdf(tmp_path / "a.pdf", [(14400, 7200)])
    page = only_page(tmp_path / "a.pdf", Limits(max_pixels=1_000_000, dpi=200))
    assert 900_000 < page.shape[0] * page.shape[1] <= 1_000_000
    assert page.shape[1] == pytest.approx(2 * page.shape[0], rel=0.01)


def test_a_pdf_may_begin_with_other_bytes(tmp_path: Path) -> None:
    make_pdf(tmp_path / "a.pdf", [(72, 72)])
    (tmp_path / "b.pdf").write_bytes(b"\r\n%comment\n" + (tmp_path / "a.pdf").read_bytes())
    assert only_page(tmp_path / "b.pdf").shape == (200, 200, 3)


def test_pillows_own_limit_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    picture().save(tmp_path / "a.png")
    assert only_page(tmp_path / "a.png").shape == (80, 120, 3)
    assert Image.MAX_IMAGE_PIXELS == 10


@pytest.mark.parametrize("save", [lambda path: picture().save(path, format="PNG"),
                                  lambda path: make_pdf(path, [(72, 72)])])  # fmt: skip
def test_no_file_stays_open(tmp_path: Path, save: Callable[[Path], None]) -> None:
    save(tmp_path / "a")
    only_page(tmp_path / "a")
    opened = {link.readlink() for link in Path("/proc/self/fd").iterdir() if link.is_symlink()}
    assert tmp_path / "a" not in opened


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "CMYK", "I;16"])
def test_an_uncompressed_tiff_is_turned_as_a_compressed_one(
    tmp_path: Path, mode: str, orientation: int
) -> None:
    stored = picture("I;16") if mode == "I;16" else picture(mode)
    for name, compression in (("plain", "raw"), ("packed", "tiff_lzw")):
        stored.save(tmp_path / name, format="TIFF", compression=compression, tiffinfo={0x0112: orientation})
    page = only_page(tmp_path / "plain")
    assert page.shape == ((80, 120, 3) if orientation < 5 else (120, 80, 3))
    assert (page == only_page(tmp_path / "packed")).all()


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 2}])
def test_a_jpeg_without_its_end_marker_is_whole(tmp_path: Path, options: dict[str, int]) -> None:
    picture().save(tmp_path / "a.jpg", quality=90, **options)
    data = (tmp_path / "a.jpg").read_bytes()
    assert data.endswith(b"\xff\xd9")
    (tmp_path / "b.jpg").write_bytes(data[:-2])
    assert (only_page(tmp_path / "b.jpg") == only_page(tmp_path / "a.jpg")).all()


def test_the_reserved_fields_of_a_bmp_may_hold_anything(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.bmp")
    data = bytearray((tmp_path / "a.bmp").read_bytes())
    data[6:10] = b"scan"
    (tmp_path / "a.bmp").write_bytes(data)
    assert corners(only_page(tmp_path / "a.bmp")) == COLOURS


def test_a_crop_box_beside_the_page_is_passed_over(tmp_path: Path) -> None:
    box = "/MediaBox [0 0 72 144] /CropBox [700 800 900 1000]"
    one_page(tmp_path / "a.pdf", b"0 0 36 144 re f", page=box)
    page = only_page(tmp_path / "a.pdf", Limits(dpi=72))
    assert page.shape == (144, 72, 3)
    assert (page[:, :35] == 0).all()
    assert (page[:, 37:] == 255).all()


def test_a_scan_that_claims_too_high_a_resolution_keeps_its_pixels(tmp_path: Path) -> None:
    Image.new("L", (1240, 1000), 200).save(tmp_path / "a.pdf", resolution=2400)
    height, width, _ = only_page(tmp_path / "a.pdf").shape
    assert (width, height) == pytest.approx((1240, 1000), abs=2)
    Image.new("1", (4960, 7016)).save(tmp_path / "b.pdf", resolution=2400)
    page = only_page(tmp_path / "b.pdf")
    assert page.shape[0] * page.shape[1] == pytest.approx(1654 * 2339, rel=0.01)  # A4 at 200 dpi


def test_a_page_with_a_user_unit_is_drawn_by_the_size_of_its_print(tmp_path: Path) -> None:
    text = b"BT /F 1 Tf 7 72 Td (Invoice No. 2024-0815) Tj ET"
    one_page(tmp_path / "a.pdf", text, page="/MediaBox [0 0 61 79] /UserUnit 10")
    assert only_page(tmp_path / "a.pdf").shape == pytest.approx((1756, 1356, 3), abs=3)


def test_an_ordinary_small_page_is_drawn_at_the_resolution_asked_for(tmp_path: Path) -> None:
    one_page(tmp_path / "a.pdf", b"BT /F 6 Tf 7 72 Td (A label) Tj ET", page="/MediaBox [0 0 144 72]")
    assert only_page(tmp_path / "a.pdf").shape == (200, 400, 3)
