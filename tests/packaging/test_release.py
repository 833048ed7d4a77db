"""What `make release-check` refuses."""

from __future__ import annotations

import pytest

from tests.packaging.release import changelog_faults, difference, strangers

SHOWN = """Name: inferq
Version: 0.1.0
Files:
  ../../../bin/inferq
  inferq-0.1.0.dist-info/METADATA
  inferq/__init__.py
  inferq/schemas/task.py
"""


@pytest.mark.parametrize(
    "text", ["## [0.1.0] - 2026-12-01\n", "## [Unreleased]\n\n## [0.1.0] - 2026-12-01\n- x\n"]
)
def test_a_changelog_that_was_cut_has_no_fault(text: str) -> None:
    assert changelog_faults(f"# Changelog\n\n{text}", "0.1.0") == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("## [Unreleased]\n- x\n\n## [0.1.0] - 2026-12-01\n", "move the entries of [Unreleased]"),
        ("## [Unreleased]\n", "has no heading of a version"),
        ("## [0.2.0] - 2026-12-01\n\n## [0.1.0] - 2026-11-01\n", "its newest version is [0.2.0]"),
        ("## [0.1.0]\n", "needs a date"),
    ],
)
def test_a_changelog_that_does_not_fit_the_version_is_refused(text: str, fault: str) -> None:
    (found,) = changelog_faults(f"# Changelog\n\n{text}", "0.1.0")
    assert fault in found


def test_only_inferqs_own_files_may_be_installed() -> None:
    assert strangers(SHOWN, "0.1.0") == []
    assert strangers(f"{SHOWN}  schemas/__init__.py\n  inferq.py\n", "0.1.0") == [
        "schemas/__init__.py",
        "inferq.py",
    ]


def test_an_installation_without_files_is_refused() -> None:
    assert strangers("WARNING: Package(s) not found: inferq\n", "0.1.0") == ["nothing: pip lists no files"]


def test_files_that_only_one_side_holds_are_named() -> None:
    assert difference("the wheel", {"a", "b"}, {"b", "c"}) == [
        "the wheel: c is missing",
        "the wheel: a should not be there",
    ]
