"""A stand-in for FaceFusion 3.8: the functions that our driver calls, and the same words, codes and exits.

This one file plays all modules of the package. What it does is read from the file `behaviour` beside the package;
what it was asked goes to `calls.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

HOME = Path(__file__).parents[1]
STATE: dict[str, Any] = {"process": "pending"}
POOL: dict[str, Any] = {}
FACES: list[str] = []

for _name in (
    *(
        "args",
        "conda",
        "content_analyser",
        "core",
        "download",
        "exit_helper",
        "face_store",
        "filesystem",
        "logger",
    ),
    *("metadata", "process_manager", "processors", "processors.core", "state_manager", "vision"),
):
    sys.modules[f"facefusion.{_name}"] = sys.modules[__name__]


def behaviour() -> str:
    return (HOME / "behaviour").read_text().strip()


def note(**what: Any) -> None:
    with (HOME / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps(what | {"pid": os.getpid()}) + "\n")


def say(text: str) -> None:
    sys.stdout.write(f"[FACEFUSION.CORE] {text}\n")
    sys.stdout.flush()


def create_program() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("-v", "--version", action="version", version="FaceFusion 3.8.0")
    run = parser.add_subparsers(dest="command").add_parser("headless-run")
    run.add_argument("-s", "--source-paths", nargs="+")
    run.add_argument("-t", "--target-path")
    run.add_argument("-o", "--output-path")
    run.add_argument("--processors", nargs="+", choices=["face_swapper", "face_enhancer"])
    run.add_argument("--execution-providers", nargs="+", choices=["cuda", "cpu"])
    run.add_argument("--face-selector-mode", choices=["many", "one", "reference"], default="reference")
    run.add_argument("--face-selector-order", choices=["large-small", "left-right"])
    run.add_argument("--reference-face-position", type=int, default=0)
    run.add_argument("--reference-face-distance", type=float, choices=[0.05, 0.3], default=0.3)
    run.add_argument("--video-memory-strategy", choices=["strict", "moderate", "tolerant"], default="strict")
    run.add_argument("--jobs-path", default=".jobs")
    run.add_argument("--temp-path", default=".temp")
    run.add_argument("--log-level", choices=["error", "warn", "info", "debug"], default="info")
    return parser


# Of conda, metadata, logger, state_manager, args, exit_helper:


def setup() -> None:
    STATE["conda"] = True
    note(environment=sorted(os.environ))


def get(_key: str) -> str:
    return "3.8.0"


def init(_level: str) -> None:
    pass


def init_item(key: str, value: Any) -> None:
    STATE[key] = value


def get_item(key: str) -> Any:
    return STATE.get(key)


def apply_args(args: dict[str, Any], apply: Callable[[str, Any], None]) -> None:
    for key, value in args.items():
        apply(key, value)


def signal_exit(_number: int, _frame: object) -> None:
    sys.exit(0)


# Of core: what it checks before a run.


def validate_args(_program: argparse.ArgumentParser) -> bool:
    return behaviour() != "bad configuration"


def pre_check() -> bool:
    if behaviour() == "no ffmpeg":
        say("FFMpeg is not installed")
    return behaviour() != "no ffmpeg"


def common_pre_check() -> bool:
    return behaviour() != "filter changed"


def processors_pre_check() -> bool:
    if behaviour() == "no weights":
        say("Validating source for inswapper_128_fp16 failed")
    note(weights=resolve_relative_path("../.assets/models/face.onnx"))
    return behaviour() != "no weights"


# Of filesystem and download:


def resolve_relative_path(path: str) -> str:
    return os.path.normpath(HOME / "facefusion" / path)


# Of process_manager:


def stop() -> None:
    STATE["process"] = "stopping"


def end() -> None:
    STATE["process"] = "pending"


# The models:


class Session:
    """A model, as a session of onnxruntime."""

    def get_inputs(self) -> list[argparse.Namespace]:
        return [argparse.Namespace(name="input", shape=["batch", 3, 4, 4], type="tensor(float)")]

    def run(self, _outputs: None, inputs: dict[str, Any]) -> None:
        if behaviour() == "no warm-up":
            raise RuntimeError("wrong shape")
        note(ran=[list(value.shape) for value in inputs.values()])


class FaceSwapper:
    __name__ = "facefusion.processors.modules.face_swapper.core"

    def get_common_modules(self) -> list[Any]:
        return [
            argparse.Namespace(__name__="facefusion.face_masker", get_inference_pool=lambda: {}["unused"])
        ]

    def get_inference_pool(self) -> dict[str, Session]:
        match behaviour():
            case "hang in load":
                (HOME / "pids.new").write_text(str(os.getpid()))
                (HOME / "pids.new").rename(HOME / "pids")
                time.sleep(600)
            case "cannot load":
                say("Loading model face.onnx failed")
                os._exit(1)
            case "no memory to load":
                sys.stderr.write("BFCArena: Failed to allocate memory for requested buffer\n")
                sys.stderr.flush()
                os._exit(1)
        if not POOL:
            note(loaded="face.onnx")
            POOL["face_swapper"] = Session()
        return POOL


def get_processors_modules(_processors: list[str]) -> list[FaceSwapper]:
    return [FaceSwapper()]


# What is remembered from picture to picture:


@lru_cache
def analyse_image(path: str) -> bool:
    from PIL import Image

    with Image.open(path) as picture:
        return picture.convert("RGB").getpixel((0, 0)) == (255, 0, 0)


@lru_cache
def read_static_image(path: str) -> bytes:
    return Path(path).read_bytes()


def clear_faces() -> None:
    FACES.clear()


# The workflow:


def conditional_process() -> int:
    STATE["process"] = "processing"
    FACES.append(STATE["source_paths"][0])
    source = read_static_image(STATE["source_paths"][0])
    note(state=STATE, faces=FACES, source=len(source))
    if analyse_image(STATE["target_path"]):
        return 3
    FaceSwapper().get_inference_pool()
    error = process(behaviour(), STATE["target_path"], STATE["output_path"])
    if STATE["video_memory_strategy"] != "tolerant":
        POOL.clear()
    return error


def process(behaviour: str, target: str, output: str) -> int:
    """Swap, or what else is asked for. Gives the error code of the workflow."""
    match behaviour:
        case "gate":
            return 3
        case "no source face":
            say("No source face detected!")
            return 2
        case "copy fails":
            say("Copying image failed")
            return 1
        case "crash":
            raise RuntimeError("a bug")
        case "hard exit 1" | "hard exit 2" | "hard exit 0":
            sys.exit(int(behaviour[-1]))
        case "exit with words":
            sys.exit("the processor could not be loaded")
        case "fatal exit":
            say("Loading model inswapper_128_fp16 failed")
            os._exit(1)
        case "out of memory":
            raise RuntimeError(
                "onnxruntime::BFCArena::AllocateRawInternal Failed to allocate memory for requested buffer"
            )
        case "weights":
            say("Validating source for inswapper_128_fp16 failed")
            return 1
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "interrupted":
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(600)
        case "hang":
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            (HOME / "pids.new").write_text(f"{os.getpid()} {child.pid}")
            (HOME / "pids.new").rename(HOME / "pids")
            time.sleep(600)
        case "slow":
            (HOME / "pids").write_text(str(os.getpid()))
            while STATE["process"] != "stopping":
                time.sleep(0.01)
            return 4
        case "garbage":
            Path(output).write_bytes(b"\x89PNG\r\n\x1a\n")
            return 0
        case "chatter":
            sys.stdout.write('{"ended": 3}\n{"ready": "0"}\n' + "x" * 5_000_000)
            for number in range(2000):
                sys.stdout.write(f"\rline {number} \u4eba\u8138")
            sys.stdout.flush()
    from PIL import Image, ImageDraw

    say("Copying image with a resolution of 512x600")
    sys.stderr.write("\rprocessing:   0%|          | 0/2\rprocessing:  50%|=====     | 1/2")
    sys.stderr.write("\rprocessing: 100%|==========| 2/2\n")
    with Image.open(target) as opened:
        picture = opened.convert("RGB")
    if behaviour != "untouched":
        ImageDraw.Draw(picture).rectangle((5, 5, 30, 30), fill=(1, 2, 3))
    say("Finalizing image with a resolution of 512x600")
    picture.save(output)
    say("Processing to image succeed in 1.23 seconds")
    return 0
