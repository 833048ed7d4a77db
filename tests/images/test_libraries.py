"""The check for shared libraries finds what an image lacks, even if this machine has it."""

from __future__ import annotations

import shutil
from importlib.metadata import files
from pathlib import Path

from tests.images.libraries import missing


def _library(distribution: str, ending: str) -> Path:
    found = next(file for file in files(distribution) or () if str(file).endswith(ending))
    return Path(str(found.locate()))


def test_a_library_of_the_machine_alone_is_missing(tmp_path: Path) -> None:
    shutil.copy(_library("opencv-contrib-python", "platforms/libqxcb.so"), tmp_path)
    lacking = missing(tmp_path, frozenset())
    assert lacking["libGL.so.1"] == ["libqxcb.so"]
    assert "libc.so.6" not in lacking


def test_what_the_base_image_has_is_not_missing(tmp_path: Path) -> None:
    (tmp_path / "a.so").write_text("a linker script, or nothing of the kind")
    shutil.copy(_library("psutil", ".abi3.so"), tmp_path)
    assert missing(tmp_path, frozenset()) == {}


def test_a_library_of_the_environment_is_not_missing(tmp_path: Path) -> None:
    shutil.copy(_library("numpy", "libgfortran-040039e1.so.5.0.0"), tmp_path)
    assert missing(tmp_path, frozenset()).keys() == {"libquadmath-96973f99.so.0.0.0"}
    beside = tmp_path / "numpy.libs"
    beside.mkdir()
    shutil.copy(_library("numpy", "libquadmath-96973f99.so.0.0.0"), beside)
    assert missing(tmp_path, frozenset()) == {}
