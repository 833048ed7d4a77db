"""What the wheel of this tree holds, compared with the tree: `python -m tests.packaging.wheel`, in `make lint`.

setup.cfg lists the packages by hand. One that is missing there would be missing from every installation, and
no test that runs in the checkout would notice.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROOMS = ("schemas", "broker", "storage", "producer", "consumers")
_SHIPPED = {".py", ".typed", ".lua", ".html", ".css", ".js", ".json", ".txt"}


def build(folder: Path, *, root: Path = ROOT, sdist: bool = False) -> Path:
    """The wheel (or the sdist) of the tree at `root`, built in `folder` from a copy.

    A `build/` or `*.egg-info` that an earlier build left in the checkout would add its own modules.
    """
    source = folder / "source"
    source.mkdir(parents=True)
    for room in (*ROOMS, "inferq"):
        shutil.copytree(
            root / room, source / room, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, source)
    kind = "--sdist" if sdist else "--wheel"
    command = [
        sys.executable,
        "-P",
        "-m",
        "build",
        kind,
        "--no-isolation",
        "--outdir",
        str(folder),
        str(source),
    ]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{made.stdout[-2000:]}{made.stderr[-2000:]}")
    return next(folder.glob("*.tar.gz" if sdist else "*.whl"))


def all_in_wheel(wheel: Path) -> set[str]:
    """The names of all files in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def in_wheel(wheel: Path) -> set[str]:
    """The files that installing the wheel adds to site-packages, metadata aside."""
    return {name for name in all_in_wheel(wheel) if ".dist-info/" not in name}


def in_tree(root: Path = ROOT) -> set[str]:
    """The files of the tree that belong into site-packages, by their names there."""
    own = {f"inferq/{path.name}" for path in (root / "inferq").iterdir() if path.suffix in _SHIPPED}
    return own | {
        f"inferq/{path.relative_to(root)}"
        for room in ROOMS
        for path in (root / room).rglob("*")
        if path.suffix in _SHIPPED and path.is_file()
    }


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="inferq-wheel-") as folder:
        found = in_wheel(build(Path(folder)))
    expected = in_tree()
    for name in sorted(expected - found):
        print(f"wheel: {name} is missing: add its package to `packages` (or package_data) in setup.cfg")
    for name in sorted(found - expected):
        print(f"wheel: {name} is installed, but is not in the tree, or not below inferq/")
    return int(found != expected)


if __name__ == "__main__":
    sys.exit(main())
