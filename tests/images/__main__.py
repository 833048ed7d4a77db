"""`make image-check`: installs what each image installs into an environment of its own, and starts it.

`make image-check ARGS="echo gateway"` checks these targets and leaves docs/images.md alone. No image is built. The
check shows that the pins can be installed together, that no package and no shared library is missing which this
machine or another extra happens to have, and that the entry point accepts its settings. uv stands in for pip, which
takes ten times as long. For a GPU:

- Paddle's builds for GPUs are in an index of Paddle's own, and need gigabytes: the build for the CPU stands in.
- torch comes with CUDA's libraries.
- `uv` resolves what pip would install on Linux with the builds for GPUs, as far as they are on PyPI.
- FaceFusion itself is not installed: its sources are not on PyPI.
- Where no GPU is, `--check` has to say so.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from inferq.consumers.machine import gpu_fault
from tests.images.dockerfile import ROOT, Image, images, stages
from tests.images.libraries import missing

PAGE = ROOT / "docs" / "images.md"
TEXT = Path(__file__).with_name("page.md")
ENGINES = {
    "ocr-gpu": "from inferq.consumers.ocr import engine; import paddle; from paddleocr import PaddleOCR",
    "ner-gpu": "from inferq.consumers.ner import engine; import paddle; from paddlenlp import Taskflow",
    "acestep-gpu": "from inferq.consumers.acestep import engine; import torch, accelerate; "
    "from diffusers import AceStepPipeline",
}
"""What the engine of an image imports when it loads."""
UV = (sys.executable, "-m", "uv")
NO_GPU = "there is no GPU here"


class Fault(Exception):
    """What is wrong with an image."""


@dataclass(frozen=True)
class Checked:
    """Of an installed image: bytes and packages."""

    size: int
    packages: int


def main() -> int:
    parser = argparse.ArgumentParser(prog="make image-check", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="the targets to check; all by default")
    names = parser.parse_args().targets
    known = {image.target: image for image in images()}
    if unknown := set(names) - known.keys():
        parser.error(f"no target of the Dockerfile: {', '.join(sorted(unknown))}")
    found: dict[str, Checked] = {}
    with tempfile.TemporaryDirectory(prefix="inferq-image-") as folder:
        base = _base_python(Path(folder))
        for image in [known[name] for name in names] or known.values():
            with tempfile.TemporaryDirectory(prefix="environment-", dir=folder) as environment:
                try:
                    found[image.target] = checked = check(image, Path(environment), base)
                except Fault as fault:
                    print(f"{image.target}: {fault}", flush=True)
                    continue
            print(
                f"{image.target}: starts, {checked.size / 1e6:.0f} MB, {checked.packages} packages",
                flush=True,
            )
    shutil.rmtree(
        ROOT / "build", ignore_errors=True
    )  # setuptools leaves it, and a later wheel would take from it
    complete = found.keys() == (set(names) or known.keys())
    if complete and not names:
        PAGE.write_text(page([known[name] for name in found], found), "utf-8")
        print(f"written to {PAGE.relative_to(ROOT)}")
    return 0 if complete else 1


def _base_python(folder: Path) -> Path:
    """What the build stage prepares: a Python with the tool that lists packages."""
    base = _environment(folder / "base")
    (prepare,) = stages()["build"].runs
    _shell(prepare.partition(" && ")[0], base, "the build stage")
    return base


def check(image: Image, folder: Path, base: Path) -> Checked:
    """Install and start an image. Raises Fault."""
    if image.target.endswith("-gpu"):
        _resolve(image)
    _environment(folder)
    for command in image.builds:
        _shell(_on_this_machine(command, folder, base), folder, "cannot be installed")
    if lacking := missing(folder, image.packages):
        raise Fault(f"lacks shared libraries: {json.dumps(lacking, indent=2)}")
    components = json.loads((folder / "sbom.json").read_text("utf-8"))["components"]
    if "inferq" not in {component["name"] for component in components}:
        raise Fault("its list of packages does not name inferq")
    if imports := ENGINES.get(image.target):
        _run(
            [folder / "bin" / "python", "-P", "-c", f"import inferq.consumers.runtime.child; {imports}"],
            image,
            folder,
            "the engine cannot be imported",
        )
    _start(image, folder)
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return Checked(sum(path.stat().st_size for path in files), len(components))


def _resolve(image: Image) -> None:
    """Let uv choose the versions for Linux on x86-64, with the builds for GPUs that are on PyPI."""
    wanted, pins = [], ""
    for install in image.installs:
        pins = install[install.index("-c") + 1]
        if "--no-deps" not in install:
            wanted += [word for word in install if word not in ("-c", pins)]
    wanted = [re.sub(r"^paddlepaddle-gpu==3", "paddlepaddle==3", word) for word in wanted]
    uv = [*UV, "pip", "compile", "--quiet", "--constraint", pins, "-"]
    platform = ["--python-version", "3.11", "--python-platform", "x86_64-unknown-linux-gnu"]
    resolved = subprocess.run(
        [*uv, *platform], cwd=ROOT, input="\n".join(wanted), capture_output=True, text=True, check=False
    )
    if resolved.returncode:
        raise Fault(f"cannot be resolved: {resolved.stderr.strip()[-2000:]}")


def _environment(folder: Path) -> Path:
    subprocess.run([*UV, "venv", "--quiet", "--seed", "--python", sys.executable, folder], check=True)
    return folder


def _on_this_machine(command: str, folder: Path, base: Path) -> str:
    sbom = f"{base}/bin/{stages()['build'].environment['SBOM']}"
    command = command.replace("$SBOM", sbom).replace("/opt/inferq", str(folder))
    return re.sub(r'--index-url "\$\{\w+:\?\}" ', "", command).replace("paddlepaddle-gpu", "paddlepaddle")


def _start(image: Image, folder: Path) -> None:
    command = [folder / "bin" / image.entry_point[0], *image.entry_point[1:], *image.arguments, "--check"]
    if image.environment.get("INFERQ_DEVICE") != "cuda" or gpu_fault(0) is None:
        _run(command, image, folder, "does not start")
        return
    try:
        _run(command, image, folder, "does not start")
    except Fault as fault:
        if NO_GPU not in str(fault):
            raise
    else:
        raise Fault(f"--check does not say that {NO_GPU}")


def _run(command: list[str | Path], image: Image, folder: Path, trouble: str) -> None:
    clean = {name: os.environ[name] for name in ("LANG", "LC_ALL") if name in os.environ}
    settings = {name: value for name, value in image.environment.items() if name.startswith("INFERQ_")}
    ended = subprocess.run(
        list(map(str, command)),
        env=clean | settings | {"PATH": f"{folder}/bin:/usr/bin:/bin", "HOME": str(folder)},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    if ended.returncode:
        said = (ended.stderr or ended.stdout).strip()[-2000:]
        raise Fault(f"{trouble} (status {ended.returncode}): {said}")


def _shell(command: str, environment: Path, trouble: str) -> None:
    uv = " ".join(UV)
    pip = f'pip() {{ {uv} pip "$1" --quiet --python {environment}/bin/python "${{@:2}}"; }}'
    ended = subprocess.run(
        ["bash", "-ec", f"{pip}; {command}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode:
        raise Fault(f"{trouble}: {(ended.stderr or ended.stdout).strip()[-2000:]}")


def page(checked: list[Image], found: dict[str, Checked]) -> str:
    """The page of images."""
    rows = []
    for image in checked:
        extras = next(word for word in image.installs[0] if word.startswith(".[")).replace(",otel", "")
        result = found[image.target]
        rows.append(f"| `{image.target}` | `{extras}` | {result.packages} | {result.size / 1e6:.0f} |")
    return TEXT.read_text("utf-8").replace("ROWS\n", "".join(f"{row}\n" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
