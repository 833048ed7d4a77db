"""Test processes of one run render each manifest once."""

from __future__ import annotations

import os

import pytest

from tests.k8s import manifests


@pytest.fixture(scope="session", autouse=True)
def shared_renderings(tmp_path_factory: pytest.TempPathFactory) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:  # its folder is one of several in the run's own
        manifests.shared = tmp_path_factory.getbasetemp().parent / "kustomize"
        manifests.shared.mkdir(exist_ok=True)
