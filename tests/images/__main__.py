"""`make image-check`: installs what each image for the CPU installs into an environment of its own, and starts it.

`make image-check ARGS="echo gateway"` checks these targets and leaves docs/images.md alone. No image is built. The
check shows that the pins can be installed together, that no package is missing which another extra happens to
bring, and that the entry point accepts its settings.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from tests.images.dockerfile import ROOT, Image, images

PAGE = ROOT / "docs" / "images.md"


def main() -> int:
    chosen = [image for image in images() if not image.target.endswith("-gpu")]
    if names := sys.argv[1:]:
        if unknown := set(names) - {image.target for image in chosen}:
            print(f"no target for the CPU in the Dockerfile: {', '.join(sorted(unknown))}", file=sys.stderr)
            return 2
        chosen = [image for image in chosen if image.target in names]
    rows, faults = [], 0
    for image in chosen:
        with tempfile.TemporaryDirectory(prefix="inferq-image-") as folder:
            size, fault = check(image, Path(folder))
        print(f"{image.target}: {fault or 'starts'}, {size / 1e6:.0f} MB installed", flush=True)
        faults += fault is not None
        rows.append(f"| `{image.target}` | `{image.installs[0][-1]}` | {size / 1e6:.0f} |")
    if not faults and not names:
        PAGE.write_text(_page(rows), "utf-8")
        print(f"written to {PAGE.relative_to(ROOT)}")
    return 1 if faults else 0


def check(image: Image, folder: Path) -> tuple[int, str | None]:
    """Install and start an image. Gives the bytes installed, and what went wrong."""
    venv.create(folder, with_pip=True)
    for arguments in image.installs:
        installed = subprocess.run(
            [str(folder / "bin" / "pip"), "install", "-q", "--no-input", *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        if installed.returncode:
            return 0, f"cannot be installed: {installed.stderr.strip()[-2000:]}"
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    clean = {name: os.environ[name] for name in ("LANG", "LC_ALL") if name in os.environ}
    settings = {name: value for name, value in image.environment.items() if name.startswith("INFERQ_")}
    started = subprocess.run(
        [str(folder / "bin" / image.entry_point[0]), *image.entry_point[1:], *image.arguments, "--check"],
        env=clean | settings | {"PATH": f"{folder}/bin:/usr/bin:/bin", "HOME": str(folder)},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    if started.returncode:
        return size, f"does not start: {(started.stderr or started.stdout).strip()[-2000:]}"
    return size, None


def _page(rows: list[str]) -> str:
    lines = [
        "# Images",
        "",
        "Made by `make image-check`, which installs what each target of the Dockerfile installs for the CPU into an",
        "empty environment and starts its entry point with `--check`. Sizes are those of the environment: the base",
        "image and the weights come on top.",
        "",
        "| target | installs | MB |",
        "| --- | --- | ---: |",
        *rows,
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
