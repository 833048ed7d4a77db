"""What a facefusion task may say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from inferq.consumers.facefusion import FacefusionTask, task_type
from inferq.producer.cli.arguments import bundle, parse_assignments
from inferq.schemas import InvalidTask, get_type, parse_task

BARE = {
    "task_id": "face_001",
    "task_type": "facefusion",
    "source_url": "https://example.com/source.jpg",
    "target_url": "https://example.com/target.jpg",
}


def test_the_bare_message_of_any_producer_is_a_whole_task() -> None:
    task = parse_task(BARE)
    assert isinstance(task, FacefusionTask)
    assert (task.options.face, task.options.format) == ("largest", "png")
    assert list(task.inputs()) == ["source_url", "target_url"]


@pytest.mark.parametrize("face", ["largest", "all", 0, 7])
def test_a_face_is_named_or_numbered(face: str | int) -> None:
    task = parse_task({**BARE, "options": {"face": face}})
    assert isinstance(task, FacefusionTask)
    assert task.options.face == face


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"face": "smallest"}, "face"),
        ({"face": -1}, "face"),
        ({"face": True}, "face"),
        ({"face": 1.5}, "face"),
        ({"format": "gif"}, "format"),
        ({"quality": 0}, "quality"),
        ({"quality": 101}, "quality"),
        ({"skip_content_filter": True}, "skip_content_filter"),
    ],
)
def test_a_wrong_option_is_refused_by_name(options: dict[str, object], named: str) -> None:
    with pytest.raises(InvalidTask, match=named):
        parse_task({**BARE, "options": options})


@pytest.mark.parametrize("missing", ["source_url", "target_url"])
def test_both_pictures_are_needed(missing: str) -> None:
    with pytest.raises(InvalidTask, match=missing):
        parse_task({name: value for name, value in BARE.items() if name != missing})


def test_the_command_line_takes_them_in_pairs(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    kind = get_type("facefusion")
    made = bundle(kind, [str(tmp_path / "a.png"), "https://example.com/b.png"] * 2, given={})
    assert len(made) == 2
    assert made[0]["source_url"].file == tmp_path / "a.png"
    assert made[1]["target_url"].text == "https://example.com/b.png"
    assert parse_assignments(kind, ["face=1", "format=jpeg"]) == {"options": {"face": 1, "format": "jpeg"}}


def test_describing_the_type_loads_no_library() -> None:
    heavy = "{'numpy', 'PIL', 'cv2', 'mediapipe', 'matplotlib'}"
    code = f"import sys, inferq.consumers.facefusion; assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert task_type.arguments == ("source_url", "target_url")
