"""Pictures of every kind as source and target, and what is refused."""

from __future__ import annotations

import struct
import zlib
from contextlib import closing

import cv2
import numpy as np
import pytest
from PIL import Image

from inferq.consumers.facefusion.engine import FacefusionEngine
from inferq.schemas import InvalidTask
from tests.facefusion.conftest import COLLINS, HOPPER, Runner, facefusion_task, pixels


def portrait() -> Image.Image:
    return Image.fromarray(pixels(HOPPER))


def transparent() -> Image.Image:
    image = portrait().convert("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 512, 60))
    return image


def sixteen_bit() -> Image.Image:
    return Image.fromarray(np.asarray(portrait().convert("L"), np.uint16) * 257)


@pytest.mark.parametrize(
    ("image", "name"),
    [
        (transparent(), "a.png"),
        (portrait().convert("L"), "a.png"),
        (portrait().convert("P"), "a.gif"),
        (sixteen_bit(), "a.png"),
        (sixteen_bit(), "a.tiff"),
        (portrait().convert("CMYK"), "a.jpg"),
        (portrait(), "a.webp"),
        (portrait(), "a.bmp"),
    ],
    ids=["alpha", "grey", "palette", "16-bit PNG", "16-bit TIFF", "CMYK", "WebP", "BMP"],
)
def test_any_kind_of_picture_is_source_and_target(
    preview: FacefusionEngine, runner: Runner, image: Image.Image, name: str
) -> None:
    path = runner.file(image, name)
    for source, target in ((path, COLLINS), (COLLINS, path)):
        run = runner(preview, source, target)
        assert run.output is not None
        assert run.output.swapped == (0,)
    assert run.picture.shape == (600, 512, 3)
    if name == "a.png" and image.mode == "RGBA":
        assert (run.picture[:60] == 255).all()
    if image.mode in {"L", "I;16"}:
        spread = run.picture.max(axis=2).astype(int) - run.picture.min(axis=2)
        assert spread.max() <= 12  # a grey target stays grey


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_the_picture_is_upright_whatever_exif_says(
    preview: FacefusionEngine, runner: Runner, orientation: int
) -> None:
    stored = portrait().rotate({3: 180, 6: 90, 8: 270}[orientation], expand=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = runner.file(stored, "a.jpg", quality=98, subsampling=0, exif=exif)
    run = runner(preview, COLLINS, path)
    assert run.output is not None
    assert (run.output.width, run.output.height) == (512, 600)
    assert np.abs(np.array((run.output.target_faces or ())[0].box) - (169, 131, 357, 333)).max() < 8
    with Image.open(run.context.artifacts[0].path) as made:
        assert made.size == (512, 600)
        assert 0x0112 not in made.getexif()


def test_the_targets_colour_profile_is_kept(preview: FacefusionEngine, runner: Runner) -> None:
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    path = runner.file(portrait(), "a.jpg", icc_profile=profile)
    for chosen in ("png", "jpeg", "webp"):
        run = runner(preview, COLLINS, path, format=chosen)
        with Image.open(run.context.artifacts[0].path) as made:
            assert made.info.get("icc_profile") == profile
    run = runner(preview, path, COLLINS)
    with Image.open(run.context.artifacts[0].path) as made:
        assert "icc_profile" not in made.info


def png_claiming(width: int, height: int) -> bytes:
    """A well-formed PNG that says it has that many pixels, and holds next to none."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(9)))


@pytest.mark.parametrize(
    ("content", "code", "said"),
    [
        (b"", "empty_file", "empty"),
        (b"this is no picture\n", "not_an_image", "but text"),
        (b"%PDF-1.7\n", "not_an_image", "a PDF"),
        (b"PK\x03\x04" + bytes(40), "not_an_image", "Office document"),
        (b"\x00\x01\x02\xff" * 20, "not_an_image", "AVIF and PPM"),
        (HOPPER.read_bytes()[:9000], "truncated_image", "JPEG file is damaged or truncated"),
        (COLLINS.read_bytes()[:200_000], "truncated_image", "PNG file is damaged or truncated"),
        (png_claiming(30_000, 30_000), "image_too_large", "30000×30000.*INFERQ_FACEFUSION_MAX_PIXELS"),
        (png_claiming(10_000, 3), "image_too_large", "10000×3"),
    ],
    ids=["empty", "text", "PDF", "archive", "unknown", "cut JPEG", "cut PNG", "bomb", "strip"],
)
@pytest.mark.parametrize("field", ["source_url", "target_url"])
def test_what_is_no_picture_is_refused_by_the_name_of_its_field(
    preview: FacefusionEngine, runner: Runner, content: bytes, code: str, said: str, field: str
) -> None:
    bad = runner.folder / "a.png"
    bad.write_bytes(content)
    files = {"source_url": COLLINS, "target_url": HOPPER, field: bad}
    with pytest.raises(InvalidTask, match=f"^{field}: .*{said}") as caught:
        runner(preview, files["source_url"], files["target_url"])
    assert caught.value.code == code
    assert "documents" not in caught.value.message
    assert runner.runs[-1].context.artifacts == []


def test_both_sizes_are_checked_before_either_is_decoded(preview: FacefusionEngine, runner: Runner) -> None:
    damaged, bomb = runner.folder / "a.png", runner.folder / "b.png"
    damaged.write_bytes(COLLINS.read_bytes()[:200_000])
    bomb.write_bytes(png_claiming(30_000, 30_000))
    with pytest.raises(InvalidTask, match=r"^target_url") as caught:
        runner(preview, damaged, bomb)
    assert caught.value.code == "image_too_large"


def test_the_limit_is_a_setting(
    preview: FacefusionEngine, runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFERQ_FACEFUSION_MAX_PIXELS", "300000")
    with closing(FacefusionEngine()) as engine:
        engine._loaded = preview._loaded
        runner(engine, COLLINS, COLLINS)
        with pytest.raises(InvalidTask, match=r"512×600 pixels; the limit is 0\.3 million"):
            runner(engine, COLLINS, HOPPER)
        engine._loaded = None  # it belongs to `preview`


def test_a_picture_too_long_for_webp_is_refused_before_it_is_computed(
    preview: FacefusionEngine, runner: Runner
) -> None:
    long = np.full((200, 17_000, 3), 128, np.uint8)
    long[:, :171] = cv2.resize(pixels(HOPPER), (171, 200), interpolation=cv2.INTER_AREA)
    with pytest.raises(InvalidTask, match=r"17000×200.*options\.format") as caught:
        runner(preview, COLLINS, long, format="webp")
    assert caught.value.code == "image_too_large"
    assert [note for _, note in runner.runs[-1].reports] == ["reading the pictures"]


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 150)])
def test_tiny_pictures_have_no_face(preview: FacefusionEngine, runner: Runner, size: tuple[int, int]) -> None:
    with pytest.raises(InvalidTask) as caught:
        runner(preview, COLLINS, runner.file(Image.new("RGB", size)))
    assert caught.value.code == "no_face_found"


def test_a_source_may_be_its_own_target(preview: FacefusionEngine, runner: Runner) -> None:
    """Its face comes back in its place: what the swap itself costs in likeness."""
    run = runner(preview, HOPPER, HOPPER)
    assert np.abs(run.picture.astype(int) - pixels(HOPPER)).mean() < 1.5


def test_a_missing_file_is_no_fault_of_the_task(preview: FacefusionEngine, runner: Runner) -> None:
    gone = runner.file(pixels(COLLINS))
    run = runner.prepare(COLLINS, gone)
    gone.unlink()
    with pytest.raises(FileNotFoundError):
        preview.run(facefusion_task(), run.context)
