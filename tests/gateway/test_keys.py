from __future__ import annotations

import json
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from inferq.producer.gateway.keys import KeyFile
from inferq.schemas import InferqError, InstallationError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "keys.json"


def test_a_key_belongs_to_its_tenant(path: Path) -> None:
    keys = KeyFile(path)
    one, two = keys.add("alpha", name="laptop"), keys.add("beta")
    assert (keys.tenant_of(one), keys.tenant_of(two)) == ("alpha", "beta")
    assert one != two
    assert one.startswith("iq_")
    assert len(one) >= 3 + 27  # 160 bits in base 64
    assert [(record.tenant, record.name) for record in keys.list()] == [("alpha", "laptop"), ("beta", "")]


def test_fields_of_a_later_version_stay_in_the_file(path: Path) -> None:
    keys = KeyFile(path)
    keys.add("alpha")
    path.write_text(json.dumps([record | {"scopes": ["submit"]} for record in json.loads(path.read_text())]))
    keys.add("beta")
    assert [record.get("scopes") for record in json.loads(path.read_text())] == [["submit"], None]


@pytest.mark.parametrize("key", ["", "iq_", "x" * 10_000, "é", "\ud800", "iq_\x00"])
def test_anything_else_belongs_to_nobody(path: Path, key: str) -> None:
    keys = KeyFile(path)
    assert keys.tenant_of(key) is None
    real = keys.add("alpha")
    assert keys.tenant_of(key) is None
    assert keys.tenant_of(real[:-1]) is None


def test_the_file_never_holds_a_key_and_is_private(path: Path) -> None:
    key = KeyFile(path).add("alpha")
    assert key not in path.read_text()
    assert key[3:] not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_changes_by_another_process_show_at_once(path: Path) -> None:
    keys, other = KeyFile(path), KeyFile(path)
    assert keys.tenant_of("iq_x") is None
    for n in range(20):
        key = other.add(f"t{n}")
        assert keys.tenant_of(key) == f"t{n}"
    other.remove(other.list()[-1].key_id)
    assert keys.tenant_of(key) is None
    path.unlink()
    assert keys.list() == ()


def test_keys_added_at_once_are_all_kept(path: Path) -> None:
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda n: KeyFile(path).add(f"t{n}"), range(40)))
    keys = KeyFile(path)
    assert sorted(keys.tenant_of(key) or "" for key in made) == sorted(f"t{n}" for n in range(40))
    assert [file.name for file in path.parent.iterdir() if file.name.startswith(".")] == []


def test_removing_what_is_not_there_is_an_error(path: Path) -> None:
    with pytest.raises(InferqError, match="no key") as caught:
        KeyFile(path).remove("nonsense")
    assert caught.value.code == "unknown_key"


@pytest.mark.parametrize("tenant", ["", "a b", "a/b", "x" * 65, "a\n"])
def test_a_bad_tenant_is_refused(path: Path, tenant: str) -> None:
    with pytest.raises(InferqError) as caught:
        KeyFile(path).add(tenant)
    assert caught.value.code == "bad_tenant"


def test_a_broken_file_is_a_clear_error_and_is_not_overwritten(path: Path) -> None:
    keys = KeyFile(path)
    key = keys.add("alpha")
    assert keys.tenant_of(key) == "alpha"
    path.write_text("[{")
    # A running gateway goes on with the keys it has; starting and writing fail.
    assert keys.tenant_of(key) == "alpha"
    for call in (KeyFile(path).list, lambda: KeyFile(path).tenant_of(key), lambda: KeyFile(path).add("beta")):
        with pytest.raises(InstallationError, match="INFERQ_API_KEYS_FILE"):
            call()
    assert path.read_text() == "[{"


def test_a_place_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InstallationError, match="cannot be written"):
        KeyFile(tmp_path / "file" / "keys.json").add("alpha")
