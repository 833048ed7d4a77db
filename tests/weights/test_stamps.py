"""Stamps spare reading unchanged files again, and nothing that changed or was forged passes by them."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from inferq.consumers.weights import cache, stamps
from inferq.consumers.weights.cache import WeightsCache
from inferq.consumers.weights.manifest import WeightsRefused
from tests.weights.test_weights import FILES, Source

BYTES = FILES["model.bin"]
OTHER = bytes(reversed(BYTES))


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    """Weights in the cache, verified; their files count as settled at once."""
    monkeypatch.setattr(stamps, "_SETTLED_SECONDS", 0.0)
    made = Source(tmp_path)
    made.publish("1")
    made.cache.use("tagger").close()
    made.cache.use("tagger").close()
    return made


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are read to compare them."""
    found: list[str] = []

    def file_digest(file: Any, name: str) -> Any:
        found.append(Path(file.name).name)
        return hashlib.new(name, file.read())

    monkeypatch.setattr(cache.hashlib, "file_digest", file_digest)
    return found


def model(source: Source) -> Path:
    return source.cached("1") / "model.bin"


def stamp(source: Source) -> Path:
    return source.cache_folder / f".verified-{os.geteuid()}" / "tagger@1.json"


def change(path: Path, data: bytes) -> None:
    """Change the content alone: inode, size and `mtime` stay. The kernel's clock goes on in steps of some ms."""
    before = path.stat()
    while path.stat().st_ctime_ns == before.st_ctime_ns:
        path.write_bytes(data)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_ino, after.st_size, after.st_mtime_ns) == (
        before.st_ino,
        before.st_size,
        before.st_mtime_ns,
    )


def test_unchanged_files_are_read_once(source: Source, reads: list[str]) -> None:
    source.cache.use("tagger").close()
    assert reads == []


def test_a_change_shows_though_its_time_was_set_back(source: Source) -> None:
    change(model(source), OTHER)
    for _ in range(2):
        with pytest.raises(WeightsRefused, match=r"model\.bin has the SHA-256"):
            source.cache.use("tagger")


def test_a_replaced_file_is_read_again(source: Source, reads: list[str]) -> None:
    shutil.copy2(model(source), source.cached("1") / "copy")
    (source.cached("1") / "copy").replace(model(source))
    source.cache.use("tagger").close()
    assert reads == ["model.bin"]


def test_a_file_that_has_just_changed_gets_no_stamp(
    source: Source, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stamps, "_SETTLED_SECONDS", 3600.0)
    change(model(source), BYTES)
    source.cache.use("tagger").close()
    source.cache.use("tagger").close()
    assert reads.count("model.bin") == 2


def test_other_checksums_in_the_manifest_ask_for_other_content(source: Source) -> None:
    text = source.path.read_text()
    source.path.write_text(text.replace(hashlib.sha256(BYTES).hexdigest(), "0" * 64))
    with pytest.raises(WeightsRefused, match=r"model\.bin has the SHA-256"):
        source.cache.use("tagger")


def _broken(path: Path) -> None:
    path.write_text('{"model.bin": 1}')


def _link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def _open_to_others(path: Path) -> None:
    path.parent.chmod(0o770)


def _folder_is_a_link(path: Path) -> None:
    path.parent.rename(path.parent.with_name("elsewhere"))
    path.parent.symlink_to("elsewhere")


@pytest.mark.parametrize("harm", [_broken, _link, _open_to_others, _folder_is_a_link])
def test_a_stamp_that_others_may_have_made_is_ignored(
    source: Source, reads: list[str], harm: Callable[[Path], None]
) -> None:
    harm(stamp(source))
    source.cache.use("tagger").close()
    assert sorted(reads) == sorted(Path(name).name for name in FILES)


def test_a_stamp_of_another_user_is_ignored(
    source: Source, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stamp(source).parent
    other = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: other)
    folder.rename(folder.with_name(f".verified-{other}"))
    source.cache.use("tagger").close()
    assert sorted(reads) == sorted(Path(name).name for name in FILES)


def test_a_stamp_copied_with_its_cache_says_nothing_of_the_copies(source: Source, tmp_path: Path) -> None:
    copied = shutil.copytree(source.cache_folder, tmp_path / "copied")
    change(copied / "tagger" / "1" / "model.bin", OTHER)
    settings = source.settings.model_copy(update={"weights_cache": copied})
    with pytest.raises(WeightsRefused, match=r"model\.bin has the SHA-256"):
        WeightsCache(settings).use("tagger")


def test_a_forged_stamp_does_not_hold_against_the_manifest(source: Source) -> None:
    """Even this user's own stamp vouches for a file only with the checksum that the manifest has."""
    change(model(source), OTHER)
    found = stamps.figures(model(source).stat())
    stamps.Stamps(source.cache_folder, "tagger", "1").save(
        {"model.bin": (hashlib.sha256(OTHER).hexdigest(), found)}
    )
    with pytest.raises(WeightsRefused, match=r"model\.bin has the SHA-256"):
        source.cache.use("tagger")


def test_verify_and_the_setting_always_read_all(source: Source, reads: list[str]) -> None:
    names = sorted(Path(name).name for name in FILES)
    source.cache.verify("tagger")
    assert sorted(reads) == names
    reads.clear()
    WeightsCache(source.settings.model_copy(update={"weights_check": "always"})).use("tagger").close()
    assert sorted(reads) == names


def test_a_cache_that_cannot_be_written_to_is_verified_each_time(
    source: Source, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stamp(source).unlink()

    def read_only(*_arguments: object, **_more: object) -> None:
        raise PermissionError(30, "Read-only file system")

    monkeypatch.setattr(os, "replace", read_only)
    for _ in range(2):
        source.cache.use("tagger").close()
    assert len(reads) == 2 * len(FILES)


def test_what_is_fetched_is_hashed_on_its_way_and_not_read_again(source: Source, reads: list[str]) -> None:
    source.publish("2")
    reads.clear()
    source.cache.use("tagger").close()
    assert reads == []


def test_a_fetch_that_goes_on_reads_only_what_was_there(source: Source, reads: list[str]) -> None:
    folder = source.publish("2", FILES | {"model.bin": OTHER})
    source.partial("2").mkdir(parents=True)
    (source.partial("2") / "model.bin").write_bytes(OTHER[:1000])
    (folder / "model.bin").write_bytes(b"x" * 1000 + OTHER[1000:])  # nobody reads these again
    reads.clear()
    source.cache.use("tagger").close()
    assert reads == ["model.bin"]
    assert (source.cached("2") / "model.bin").read_bytes() == OTHER
