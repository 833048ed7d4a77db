"""The docstring of a package names its modules, each at the start of a line: a reader finds the right file there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.packaging.wheel import ROOMS

ROOT = Path(__file__).parents[2]
PACKAGES = sorted(
    str(init.parent.relative_to(ROOT)) for room in ROOMS for init in (ROOT / room).rglob("__init__.py")
)
_NAMES = re.compile(r"^([a-z][a-z0-9_]*(?:, [a-z][a-z0-9_]*)*)(?:  .*)?$", re.MULTILINE)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_names_its_modules(package: str) -> None:
    folder = ROOT / package
    docstring = ast.get_docstring(ast.parse((folder / "__init__.py").read_text("utf-8"))) or ""
    named = [name for names in _NAMES.findall(docstring) for name in names.split(", ")]
    modules = [
        each.stem
        for each in folder.iterdir()
        if not each.name.startswith(("_", ".")) and (each.suffix == ".py" or (each / "__init__.py").exists())
    ]
    assert sorted(named) == sorted(modules)
