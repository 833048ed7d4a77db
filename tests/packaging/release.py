"""What would be published, checked: `python -m tests.packaging.release`, which is `make release-check`.

It builds the sdist and the wheel of the last commit, from a copy without anything that git does not know.
Both are checked as the package index would, and the wheel is installed into an empty environment and run.
What has passed lies in `dist/`.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tests.packaging.wheel import ROOT, all_in_wheel, in_tree, in_wheel

_DIST = ROOT / "dist"
_HEADING = re.compile(r"^## \[(?P<name>[^\]]+)\](?P<rest>.*)$", re.MULTILINE)


def changelog_faults(changelog: str, version: str) -> list[str]:
    """What is wrong with the changelog for a release of `version`."""
    headings = list(_HEADING.finditer(changelog))
    faults = []
    if headings and headings[0]["name"] == "Unreleased":
        end = headings[1].start() if len(headings) > 1 else len(changelog)
        if changelog[headings[0].end() : end].strip():
            faults.append(f"CHANGELOG.md: move the entries of [Unreleased] below a heading [{version}]")
        del headings[0]
    if not headings:
        faults.append(f"CHANGELOG.md: has no heading of a version; the one of setup.cfg is [{version}]")
    elif headings[0]["name"] != version:
        faults.append(
            f"CHANGELOG.md: its newest version is [{headings[0]['name']}], setup.cfg's is [{version}]"
        )
    elif not re.fullmatch(r" - \d{4}-\d{2}-\d{2}", headings[0]["rest"]):
        faults.append(
            f"CHANGELOG.md: the heading [{version}] needs a date, as in '## [{version}] - 2026-12-31'"
        )
    return faults


def difference(what: str, found: Iterable[str], expected: Iterable[str]) -> list[str]:
    """One line for each file that only one of the two holds."""
    found, expected = set(found), set(expected)
    missing = [f"{what}: {name} is missing" for name in sorted(expected - found)]
    return missing + [f"{what}: {name} should not be there" for name in sorted(found - expected)]


def strangers(shown: str, version: str) -> list[str]:
    """The files in the output of `pip show --files` that do not belong to inferq alone."""
    files = shown.partition("\nFiles:\n")[2].split("\n")
    names = [name.strip() for name in files if name.strip()]
    own = ("inferq/", f"inferq-{version}.dist-info/")
    return [name for name in names if not name.startswith(own) and name != "../../../bin/inferq"] or (
        [] if names else ["nothing: pip lists no files"]
    )


def check(folder: Path) -> Iterator[str]:
    """Build and check everything in `folder`; gives each fault in a line. What was built is in `folder/dist`."""
    tree, dist = folder / "tree", folder / "dist"
    archive = folder / "tree.tar"
    _run("git", "archive", "--output", str(archive), "HEAD", cwd=ROOT)
    # Not `tarfile`: Debian 12's Python lacks its filters, and later ones warn of their absence.
    tree.mkdir()
    _run("tar", "-x", "-f", str(archive), "-C", str(tree))

    print("building the sdist, a wheel out of it, and a wheel out of the tree")
    _run(sys.executable, "-P", "-m", "build", "--outdir", str(dist), str(tree))
    _run(sys.executable, "-P", "-m", "build", "--wheel", "--outdir", str(folder / "direct"), str(tree))
    wheel, direct = next(dist.glob("*.whl")), next((folder / "direct").glob("*.whl"))
    yield from difference("the wheel", in_wheel(wheel), in_tree(tree))
    yield from difference("the wheel out of the sdist", all_in_wheel(wheel), all_in_wheel(direct))

    print("checking them with twine and check-wheel-contents")
    built = [str(path) for path in dist.iterdir()]
    yield from _complaint(sys.executable, "-P", "-m", "twine", "check", "--strict", *built)
    yield from _complaint(
        sys.executable, "-P", "-m", "check_wheel_contents", "--toplevel", "inferq", str(wheel)
    )

    print("installing the wheel into an empty environment")
    venv.create(folder / "env", with_pip=True)
    bin_folder, elsewhere = folder / "env" / "bin", folder / "elsewhere"
    elsewhere.mkdir()
    pip = (str(bin_folder / "python"), "-P", "-m", "pip")
    _run(*pip, "install", "-qq", "--no-input", "-c", str(ROOT / "constraints.txt"), str(wheel))
    version = wheel.name.split("-")[1]
    shown = _run(*pip, "show", "--files", "inferq")
    yield from (f"the installed wheel: {name} is not inferq's" for name in strangers(shown, version))
    said = _run(str(bin_folder / "inferq"), "--version", cwd=elsewhere).strip()
    if said != f"inferq {version}":
        yield f"inferq --version says {said!r}, the wheel is of version {version}"
    yield from changelog_faults((tree / "CHANGELOG.md").read_text(), version)


def main() -> int:
    if changed := _run("git", "status", "--porcelain", cwd=ROOT):
        print(f"Not committed, and therefore not in it:\n{changed}")
    with tempfile.TemporaryDirectory(prefix="inferq-release-") as name:
        folder = Path(name)
        faults = list(check(folder))
        for fault in faults:
            print(fault)
        if faults:
            return 1
        _DIST.mkdir(exist_ok=True)
        for path in (folder / "dist").iterdir():
            shutil.copy(path, _DIST)
            print(f"dist/{path.name} can be published")
    return 0


def _run(*command: str, cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def _complaint(*command: str) -> Sequence[str]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return [f"{command[3]}: {(done.stdout + done.stderr).strip()}"] if done.returncode else []


if __name__ == "__main__":
    sys.exit(main())
