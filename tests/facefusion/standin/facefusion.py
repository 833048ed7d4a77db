"""A stand-in for FaceFusion 3.8's command line: the same arguments, exit statuses and words.

What it does is read from `behaviour` beside it; what it was asked goes to `calls.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image, ImageDraw

HERE = Path(__file__).parent


def say(text: str) -> None:
    sys.stdout.write(f"[FACEFUSION.CORE] {text}\n")
    sys.stdout.flush()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("-v", "--version", action="version", version="FaceFusion 3.8.0")
    run = parser.add_subparsers(dest="command").add_parser("headless-run")
    run.add_argument("-s", "--source-paths", nargs="+", required=True)
    run.add_argument("-t", "--target-path", required=True)
    run.add_argument("-o", "--output-path", required=True)
    run.add_argument("--processors", nargs="+", choices=["face_swapper", "face_enhancer"])
    run.add_argument("--execution-providers", nargs="+", choices=["cuda", "cpu"])
    run.add_argument("--face-selector-mode", choices=["many", "one", "reference"], default="reference")
    run.add_argument("--face-selector-order", choices=["large-small", "left-right"])
    run.add_argument("--reference-face-position", type=int, default=0)
    run.add_argument("--reference-face-distance", type=float, choices=[0.05, 0.3], default=0.3)
    run.add_argument("--jobs-path", default=".jobs")
    run.add_argument("--temp-path", default=".temp")
    run.add_argument("--log-level", choices=["error", "warn", "info", "debug"], default="info")
    return parser.parse_args()


def main() -> int:
    behaviour = (HERE / "behaviour").read_text().strip()
    if behaviour == "broken":
        say("FFMpeg is not installed")
        return 2
    signal.signal(signal.SIGINT, lambda *_: os._exit(0))
    given = arguments()
    with (HERE / "calls.jsonl").open("a") as calls:
        calls.write(
            json.dumps({"argv": sys.argv[1:], "cwd": str(Path.cwd()), "env": dict(os.environ)}) + "\n"
        )
    if Path.cwd() != HERE or Path(given.target_path).suffix != Path(given.output_path).suffix:
        say("Match the target and output extension!")
        return 1
    jobs = Path(given.jobs_path)
    if jobs.exists():  # somebody else's
        return 1
    for folder in (jobs / "queued", Path(given.temp_path) / "facefusion"):
        folder.mkdir(parents=True)
    say("Processing step 1 of 1")
    return process(behaviour, given)


def process(behaviour: str, given: argparse.Namespace) -> int:
    match behaviour:
        case "gate":
            return 1
        case "no source face":
            say("No source face detected!")
            return 1
        case "crash":
            raise RuntimeError("a bug")
        case "out of memory":
            say("onnxruntime::BFCArena::AllocateRawInternal Failed to allocate memory for requested buffer")
            return 1
        case "weights":
            say("Validating source for inswapper_128_fp16 failed")
            return 1
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hang":
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            (HERE / "pids.new").write_text(f"{os.getpid()} {child.pid}")
            (HERE / "pids.new").rename(HERE / "pids")
            time.sleep(600)
        case "garbage":
            Path(given.output_path).write_bytes(b"\x89PNG\r\n\x1a\n")
            return 0
        case "chatter":
            sys.stdout.write("x" * 5_000_000)
            for number in range(2000):
                sys.stdout.write(f"\rline {number} \u4eba\u8138")
            sys.stdout.flush()
    say("Copying image with a resolution of 512x600")
    sys.stderr.write("\rprocessing:   0%|          | 0/2\rprocessing:  50%|=====     | 1/2")
    sys.stderr.write("\rprocessing: 100%|==========| 2/2\n")
    with Image.open(given.target_path) as target:
        picture = target.convert("RGB")
    if behaviour != "untouched":
        ImageDraw.Draw(picture).rectangle((5, 5, 30, 30), fill=(1, 2, 3))
    say("Finalizing image with a resolution of 512x600")
    picture.save(given.output_path)
    say("Processing to image succeed in 1.23 seconds")
    return 0


sys.exit(main())
