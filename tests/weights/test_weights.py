"""Weights: fetched once, whole and right, or refused; kept for as long as somebody uses them."""

from __future__ import annotations

import fcntl
import functools
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from typer.testing import CliRunner

from inferq.consumers.weights.cache import WeightsCache, WeightsSettings, WeightsUnavailable, model_folder
from inferq.consumers.weights.cli import app
from inferq.consumers.weights.manifest import RelativePath, WeightsRefused, describe, read_manifest
from tests.certificates import certificate

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

FILES = {"model.bin": bytes(range(256)) * 4000, "vocabulary/zh words.txt": "北京\n".encode() * 100}


class Source:
    """A folder of weights, the manifest that names it, and a cache."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "manifest" / "weights.toml"
        self.path.parent.mkdir()
        self.cache_folder = folder / "cache"
        self.settings = WeightsSettings(weights_manifest=str(self.path), weights_cache=self.cache_folder)
        self.cache = WeightsCache(self.settings)
        self._folder = folder

    def folder(self, version: str) -> Path:
        return self._folder / f"source-{version}"

    def publish(self, version: str, files: dict[str, bytes] = FILES, source: str | None = None) -> Path:
        """Make a version the current one; gives the folder that its files are in."""
        folder = self.folder(version)
        for name, data in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        self.path.write_text(describe("tagger", version, source or folder.as_uri(), folder))
        return folder

    def cached(self, version: str) -> Path:
        return self.cache_folder / "tagger" / version

    def partial(self, version: str) -> Path:
        return self.cache_folder / "tagger" / f"{version}.partial"


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return Source(tmp_path)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_they_are_fetched_once_and_then_need_no_source(source: Source) -> None:
    source.publish("1")
    used = source.cache.use("tagger")
    assert (used.version, contents(used.folder)) == ("1", FILES)
    used.close()
    shutil.rmtree(source.folder("1"))
    with_nothing_left = source.cache.use("tagger")
    assert contents(with_nothing_left.folder) == FILES
    with_nothing_left.close()
    source.cache.verify("tagger")


def test_a_file_that_is_not_what_the_manifest_says_is_refused_by_name(source: Source) -> None:
    folder = source.publish("1")
    changed = bytearray(FILES["model.bin"])
    changed[-1] ^= 1
    (folder / "model.bin").write_bytes(changed)
    with pytest.raises(WeightsRefused, match=r"model\.bin has the SHA-256"):
        source.cache.use("tagger")
    assert not source.cached("1").exists()
    # Once the source is mended, so is the cache.
    (folder / "model.bin").write_bytes(FILES["model.bin"])
    source.cache.use("tagger").close()


@pytest.mark.parametrize("change", [lambda data: data + b"x", lambda data: data + data])
def test_a_source_that_is_too_long_is_refused(source: Source, change: Callable[[bytes], bytes]) -> None:
    folder = source.publish("1")
    (folder / "model.bin").write_bytes(change(FILES["model.bin"]))
    with pytest.raises(WeightsRefused, match="or more bytes"):
        source.cache.use("tagger")
    size = sum(p.stat().st_size for p in source.partial("1").rglob("*") if p.is_file())
    assert size <= sum(map(len, FILES.values())) + 1


def test_a_source_that_is_cut_short_is_gone_on_with(source: Source) -> None:
    folder = source.publish("1")
    half = len(FILES["model.bin"]) // 2
    (folder / "model.bin").write_bytes(FILES["model.bin"][:half])
    with pytest.raises(WeightsRefused, match="bytes instead of"):
        source.cache.use("tagger")
    # What was fetched is not asked for again: the first half of the source is another one by now.
    (folder / "model.bin").write_bytes(bytes(half) + FILES["model.bin"][half:])
    source.cache.use("tagger").close()


def test_what_was_damaged_in_the_cache_is_refused_until_it_is_pulled_again(source: Source) -> None:
    source.publish("1")
    source.cache.use("tagger").close()
    damaged = source.cached("1") / "vocabulary" / "zh words.txt"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    for refused in (source.cache.use, source.cache.verify):
        with pytest.raises(
            WeightsRefused, match=r"zh words\.txt has the SHA-256.* inferq weights pull tagger"
        ):
            refused("tagger")
    source.cache.pull("tagger")
    source.cache.verify("tagger")


def test_what_is_damaged_and_in_use_is_not_replaced(source: Source) -> None:
    source.publish("1")
    used = source.cache.use("tagger")
    (source.cached("1") / "model.bin").write_bytes(b"")
    with pytest.raises(WeightsRefused, match="a worker uses it"):
        source.cache.pull("tagger")
    used.close()
    source.cache.pull("tagger")
    source.cache.verify("tagger")


def test_who_comes_second_waits_for_the_first_and_fetches_nothing(source: Source) -> None:
    folder = source.publish("1")
    lock = source.cached("1").with_name("1.lock")
    lock.parent.mkdir(parents=True)
    got: list[Path] = []
    with lock.open("ab") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        second = threading.Thread(target=lambda: got.append(source.cache.pull("tagger")))
        second.start()
        second.join(0.3)
        assert second.is_alive()
        assert not source.partial("1").exists()
        folder.rename(source.cached("1"))
    second.join(20)
    assert got == [source.cached("1")]


def test_an_old_version_stays_for_as_long_as_a_process_uses_it(source: Source) -> None:
    source.publish("1")
    script = "import sys; from inferq.consumers.weights.cache import use_weights; w = use_weights('tagger')\n"
    script += "print(w.version, flush=True); sys.stdin.read()"
    environment = os.environ | {
        "INFERQ_WEIGHTS_MANIFEST": str(source.path),
        "INFERQ_WEIGHTS_CACHE": str(source.cache_folder),
    }
    with subprocess.Popen(
        [sys.executable, "-c", script], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as user:
        assert user.stdout is not None
        assert user.stdout.readline().strip() == b"1"
        source.publish("2")
        newer = source.cache.use("tagger")
        assert newer.version == "2"
        assert contents(source.cached("1")) == FILES
        user.send_signal(signal.SIGKILL)
        user.wait(20)
    assert source.cache.prune("tagger") == ["1"]
    assert source.cache.versions("tagger") == ["2"]
    newer.close()


def test_a_version_that_goes_back_is_current_again(source: Source) -> None:
    for version in ("1", "2", "1"):
        source.publish(version)
        used = source.cache.use("tagger")
        assert used.version == version
        used.close()
    assert source.cache.versions("tagger") == ["1"]


def test_from_s3_and_on_from_the_middle(
    source: Source, s3: S3Client, s3_url: str, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFERQ_S3_ENDPOINT_URL", s3_url)
    source.publish("1", source=f"s3://{bucket}/weights/v1")
    half = len(FILES["model.bin"]) // 2
    for name, data in FILES.items():
        body = bytes(half) + data[half:] if name == "model.bin" else data
        s3.put_object(Bucket=bucket, Key=f"weights/v1/{name}", Body=body)
    source.partial("1").mkdir(parents=True)
    (source.partial("1") / "model.bin").write_bytes(FILES["model.bin"][:half])
    heard: list[int] = []
    source.cache.pull("tagger", heard.append)
    assert contents(source.cached("1")) == FILES
    assert heard[0] == half
    assert sum(heard) == sum(map(len, FILES.values()))


def test_what_s3_does_not_hold_is_named(
    source: Source, s3_url: str, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFERQ_S3_ENDPOINT_URL", s3_url)
    source.publish("1", source=f"s3://{bucket}/nothing")
    with pytest.raises(WeightsUnavailable, match=rf"s3://{bucket}/nothing/model\.bin cannot be read"):
        source.cache.use("tagger")


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_arguments: object) -> None:
        return


@pytest.fixture
def https(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Path]]:
    """An HTTPS server that knows no ranges, and the folder that it serves."""
    serving, _ = certificate(tmp_path, "localhost")
    folder = tmp_path / "www"
    folder.mkdir()
    server = _Server(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(folder)))
    server.socket = serving.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "localhost.pem"))
    yield f"https://localhost:{server.server_address[1]}", folder
    server.shutdown()
    server.server_close()


def test_from_an_https_server_that_knows_no_ranges(source: Source, https: tuple[str, Path]) -> None:
    url, served = https
    folder = source.publish("1", source=f"{url}/v1")
    folder.rename(served / "v1")
    source.partial("1").mkdir(parents=True)
    (source.partial("1") / "model.bin").write_bytes(b"what was fetched before")
    source.cache.use("tagger").close()
    assert contents(source.cached("1")) == FILES


def test_what_an_https_server_does_not_have_is_named(source: Source, https: tuple[str, Path]) -> None:
    source.publish("1", source=f"{https[0]}/v9")
    with pytest.raises(WeightsUnavailable, match="404"):
        source.cache.use("tagger")


def test_a_certificate_that_nobody_vouches_for_is_refused(
    source: Source, https: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REQUESTS_CA_BUNDLE")
    source.publish("1", source=https[0])
    with pytest.raises(WeightsUnavailable, match="certificate"):
        source.cache.use("tagger")


def test_a_cache_that_cannot_be_written_to_is_named(source: Source) -> None:
    source.publish("1")
    source.cache_folder.write_text("no folder")
    with pytest.raises(WeightsUnavailable, match="INFERQ_WEIGHTS_CACHE"):
        source.cache.use("tagger")


def test_no_manifest_and_unknown_names_are_told(source: Source) -> None:
    with pytest.raises(WeightsRefused, match="INFERQ_WEIGHTS_MANIFEST"):
        WeightsCache(WeightsSettings(weights_cache=source.cache_folder)).use("tagger")
    with pytest.raises(WeightsUnavailable, match=r"weights\.toml cannot be read"):
        source.cache.use("tagger")
    source.publish("1")
    with pytest.raises(WeightsRefused, match="has no weights 'parser'; it has: tagger"):
        source.cache.use("parser")


HASH = "0" * 64


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[tagger", "is not TOML"),
        ("tagger = 1", "tagger"),
        ('[tagger]\nversion="1"\nsource="file:///x"\nfiles={}', "tagger.files"),
        ('[tagger]\nversion="../1"\nsource="file:///x"', "tagger.version"),
        ('["../x"]\nversion="1"\nsource="file:///x"', "../x"),
        ('[tagger]\nversion="1"\nsource="http://x/y"', "tagger.source"),
        ('[tagger]\nversion="1"\nsource="ftp://x"', "tagger.source"),
        (
            f'[tagger]\nversion="1"\nsource="file:///x"\nfiles={{a={{size=-1,sha256="{HASH}"}}}}',
            "files.a.size",
        ),
        ('[tagger]\nversion="1"\nsource="file:///x"\nfiles={a={size=1,sha256="abc"}}', "files.a.sha256"),
        (f'[tagger]\nversion="1"\nsource="file:///x"\nfiles={{"../a"={{size=1,sha256="{HASH}"}}}}', "../a"),
        (f'[tagger]\nversion="1"\nsource="file:///x"\nfiles={{"/a"={{size=1,sha256="{HASH}"}}}}', "/a"),
        ('[tagger]\nversion="1"\nsource="file:///x"\nmirror="y"', "tagger.mirror: is unknown"),
    ],
)
def test_a_bad_manifest_is_refused_with_the_place(text: str, said: str) -> None:
    with pytest.raises(WeightsRefused) as raised:
        read_manifest(text.encode(), "weights.toml")
    assert said in raised.value.message
    assert "weights.toml" in raised.value.message


@given(st.text(alphabet="a./\\ \n", min_size=1, max_size=12))
def test_no_path_leads_out_of_its_folder(path: str) -> None:
    try:
        TypeAdapter(RelativePath).validate_python(path)
    except ValidationError:
        return
    root = Path("/cache/tagger/1")
    resolved = Path(os.path.normpath(root / path))
    assert resolved != root
    assert resolved.is_relative_to(root)


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    private, public = tmp_path / "private.pem", tmp_path / "public.pem"
    for name in (private, tmp_path / "other.pem"):
        subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", name], check=True)
    subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], check=True)
    return private, public


def signed(source: Source, public: Path) -> WeightsCache:
    return WeightsCache(source.settings.model_copy(update={"weights_public_key": public}))


def sign(source: Source, private: Path) -> None:
    done = CliRunner().invoke(app, ["weights", "sign", str(source.path), "--key", str(private)])
    assert done.exit_code == 0, done.output


def test_a_signed_manifest_is_used_and_a_changed_one_is_not(source: Source, keys: tuple[Path, Path]) -> None:
    private, public = keys
    source.publish("1")
    cache = signed(source, public)
    with pytest.raises(WeightsUnavailable, match=r"weights\.toml\.sig cannot be read"):
        cache.use("tagger")
    sign(source, private)
    cache.use("tagger").close()
    source.publish("2")
    with pytest.raises(WeightsRefused, match="it was changed, or signed with another key"):
        cache.use("tagger")
    sign(source, private.with_name("other.pem"))
    with pytest.raises(WeightsRefused, match="it was changed, or signed with another key"):
        cache.use("tagger")
    source.path.with_name("weights.toml.sig").write_bytes(b"\xff not base64")
    with pytest.raises(WeightsRefused, match="has no valid signature by the key"):
        cache.use("tagger")
    sign(source, private)
    cache.use("tagger").close()


def test_the_commands(
    source: Source, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("INFERQ_WEIGHTS_MANIFEST", str(source.path))
    monkeypatch.setenv("INFERQ_WEIGHTS_CACHE", str(source.cache_folder))
    folder = source.publish("1")
    runner = CliRunner()
    described = runner.invoke(app, ["weights", "describe", "tagger", "1", folder.as_uri(), str(folder)])
    assert read_manifest(described.stdout.encode(), "it") == source.cache.manifest()

    (row,) = json.loads(runner.invoke(app, ["weights", "list", "--json"]).stdout)
    assert (row["name"], row["version"], row["here"], row["files"]) == ("tagger", "1", False, 2)
    assert isinstance(runner.invoke(app, ["weights", "verify"]).exception, WeightsRefused)
    app(["weights", "pull"], standalone_mode=False)
    source.publish("2")
    app(["weights", "pull", "tagger"], standalone_mode=False)
    app(["weights", "verify", "tagger"], standalone_mode=False)
    app(["weights", "list"], standalone_mode=False)
    said = capsys.readouterr().out
    assert "removed version 1, which is not in use" in said
    assert "all files match the manifest" in said
    assert "tagger" in said.splitlines()[-1]


def test_an_engines_folder_may_be_named_by_the_manifest(
    source: Source, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("INFERQ_WEIGHTS_MANIFEST", str(source.path))
    monkeypatch.setenv("INFERQ_WEIGHTS_CACHE", str(source.cache_folder))
    source.publish("1")
    assert contents(model_folder(Path("weights:tagger"))) == FILES
    assert model_folder(tmp_path) == tmp_path
    # It stays in use, for as long as this process lives.
    source.publish("2")
    assert source.cache.prune("tagger") == []
    with pytest.raises(WeightsRefused, match="has no weights 'nothing'"):
        model_folder(Path("weights:nothing"))
