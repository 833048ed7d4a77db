"""The Dockerfiles: one for each part that runs in a container, and each as careful as the others."""

from __future__ import annotations

import re
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from tests.images.dockerfile import ROOT, dockerfiles, read


def last_stage(path: Path) -> str:
    """What the finished image is made by: the stages after those that build."""
    return path.read_text("utf-8").partition("COPY --from=")[2]


def test_every_task_type_and_each_other_part_have_one() -> None:
    own = {p.name for p in entry_points(group="inferq.engines") if p.value.startswith("consumers.")}
    assert {path.parent.name for path in dockerfiles()} == own | {"gateway", "callbacks"}


@pytest.mark.parametrize("path", dockerfiles(), ids=lambda path: path.parent.name)
class TestEach:
    def test_it_installs_and_starts_what_it_is_named_after(self, path: Path) -> None:
        image = read(path)
        if image.name in {"gateway", "callbacks"}:
            assert image.command == ("inferq", image.name)
        else:
            assert image.command == ("inferq", "worker", image.name)

    def test_its_bases_are_pinned_and_its_packages_constrained(self, path: Path) -> None:
        text = path.read_text("utf-8")
        for base in re.findall(r"^FROM (\S+)", text, re.M):
            assert "$" in base or re.fullmatch(r"python:\d+\.\d+\.\d+-slim-\w+", base) or f"AS {base}" in text
        for install in re.findall(r"pip install[^\n&]*", text):
            assert re.search(r"-c constraints(-engines)?\.txt", install)

    def test_it_runs_as_nobody_in_particular_without_build_tools_and_says_whether_it_lives(
        self, path: Path
    ) -> None:
        final = last_stage(path)
        assert re.search(r"^USER 65532:65532$", final, re.M)
        assert re.search(r"^HEALTHCHECK ", final, re.M)
        assert "PYTHONDONTWRITEBYTECODE=1" in final
        assert not re.search(r"apt-get|pip install|build-essential|gcc", final)


def test_one_image_delivers_callbacks_and_is_beat_where_it_is_told_to() -> None:
    image = read(ROOT / "consumers" / "callbacks" / "Dockerfile")
    assert (image.entry_point, image.arguments) == (("inferq",), ("callbacks",))


@pytest.mark.parametrize(
    "path", [p for p in dockerfiles() if p.parent.name != "gateway"], ids=lambda path: path.parent.name
)
def test_what_writes_files_has_a_volume_for_them_on_a_read_only_root(path: Path) -> None:
    final = last_stage(path)
    # The jobs use the temporary directory, the workers a folder of their own.
    setting = "TMPDIR" if path.parent.name == "callbacks" else "INFERQ_SCRATCH_DIR"
    assert f"{setting}=/scratch " in final
    assert re.search(r"^RUN mkdir /scratch.* && chown 65532:65532 /scratch", final, re.M)
    assert re.search(r'^VOLUME \["/scratch"', final, re.M)


def test_the_images_take_along_what_they_copy() -> None:
    ignored = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    assert ignored[0] == "*"
    for needed in ("schemas", "broker", "storage", "producer", "consumers", "constraints.txt", "setup.cfg"):
        assert f"!{needed}" in ignored
