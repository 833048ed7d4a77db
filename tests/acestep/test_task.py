"""What a music task may say; what it may not is refused before anything is computed."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from inferq.consumers.acestep import AceStepTask, task_type
from inferq.consumers.acestep.engine import load_backend
from inferq.consumers.acestep.settings import AceStepSettings
from inferq.producer.cli.arguments import bundle, parse_assignments
from inferq.schemas import InstallationError, InvalidTask, get_type, parse_task

BARE = {"task_id": "a", "task_type": "acestep", "prompt": "calm piano"}


def test_a_prompt_is_a_whole_task() -> None:
    task = parse_task(BARE)
    assert isinstance(task, AceStepTask)
    assert (task.duration, task.lyrics, task.seed, task.options.format) == (30.0, None, None, "wav")
    assert json.loads(task.body()) == BARE
    assert task.inputs() == {}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"prompt": "abcd"}, "prompt: string should have at least 5 characters"),
        ({"prompt": ""}, "prompt: string should have at least 5 characters"),
        ({"prompt": "  \t\n \u3000  "}, "prompt: string should have at least 5 characters"),
        ({"prompt": " abc  "}, "prompt: string should have at least 5 characters"),
        ({"prompt": "x" * 2001}, "prompt: string should have at most 2000 characters"),
        ({"prompt": 12345}, "prompt: input should be a valid string"),
        ({"duration": 0}, "duration: input should be greater than or equal to 1"),
        ({"duration": 0.99}, "duration: input should be greater than or equal to 1"),
        ({"duration": -10}, "duration: input should be greater than or equal to 1"),
        ({"duration": 36000}, "duration: input should be less than or equal to 600, got 36000"),
        ({"duration": 600.01}, "duration: input should be less than or equal to 600"),
        ({"duration": "long"}, "duration: input should be a valid number"),
        ({"duration": "NaN"}, "duration: input should be a finite number"),
        ({"duration": None}, "duration"),
        (
            {"options": {"format": "ogg"}},
            "options.format: input should be 'wav', 'flac' or 'mp3', got \"ogg\"",
        ),
        ({"options": {"steps": 0}}, "options.steps: input should be greater than or equal to 1"),
        ({"options": {"steps": 101}}, "options.steps: input should be less than or equal to 100"),
        ({"options": {"steps": 2.5}}, "options.steps: input should be a valid integer"),
        ({"options": {"guidance": 0.5}}, "options.guidance"),
        ({"options": {"guidance": 21}}, "options.guidance"),
        ({"options": {"step": 8}}, "options.step: is unknown"),
        ({"seed": -1}, "seed: input should be greater than or equal to 0"),
        ({"seed": 2**32}, "seed: input should be less than or equal to 4294967295"),
        ({"seed": 1.5}, "seed: input should be a valid integer"),
        ({"lyrics": "la " * 1366}, "lyrics: string should have at most 4096 characters"),
        ({"lyrics": ["la"]}, "lyrics: input should be a valid string"),
        ({"prompt_url": "https://example.com/"}, "prompt_url: is unknown"),
    ],
)
def test_what_is_wrong_is_refused_by_name(change: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InvalidTask, match=complaint):
        parse_task(BARE | change)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_duration_that_is_no_number_is_refused(number: str) -> None:
    with pytest.raises(InvalidTask, match=r"not JSON|no double"):
        parse_task(json.dumps(BARE).replace("}", f', "duration": {number}}}'))


def test_a_task_without_a_prompt_is_refused() -> None:
    with pytest.raises(InvalidTask, match="prompt: is missing"):
        parse_task({"task_id": "a", "task_type": "acestep", "duration": 10})


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "音乐又慢又静"},
        {"prompt": "x" * 2000},
        {"duration": 1},
        {"duration": 600},
        {"seed": 0},
        {"seed": 2**32 - 1},
        {"lyrics": "[verse]\nla la\n\n[chorus]\nla"},
        {"lyrics": ""},
        {"options": {"steps": 100, "guidance": 1, "format": "mp3"}},
    ],
)
def test_the_limits_themselves_are_fine(change: dict[str, Any]) -> None:
    parse_task(BARE | change)


def test_the_command_line_takes_the_prompt_by_position() -> None:
    (given,) = bundle(get_type("acestep"), ["calm piano, no drums"], given={})
    assert given["prompt"].value(None) == "calm piano, no drums"  # type: ignore[arg-type]
    (given,) = bundle(get_type("acestep"), ["12345"], given={})
    assert given["prompt"].value(None) == "12345"  # type: ignore[arg-type]
    assert parse_assignments(get_type("acestep"), ["duration=10", "format=flac", "seed=3"]) == {
        "duration": 10,
        "seed": 3,
        "options": {"format": "flac"},
    }


def test_describing_the_type_loads_no_library() -> None:
    heavy = "{'numpy', 'PIL', 'soundfile', 'torch', 'diffusers'}"
    code = f"import sys, inferq.consumers.acestep; assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert task_type.arguments == ("prompt",)


def test_a_gpu_that_the_preview_cannot_use_is_refused() -> None:
    with pytest.raises(InstallationError, match="set INFERQ_ACESTEP_BACKEND=diffusers") as refused:
        load_backend(AceStepSettings(device="cuda"))
    assert refused.value.code == "device_unavailable"
