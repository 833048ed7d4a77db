"""compose.yaml names settings, targets and paths that exist, and starts every part with the same precautions."""

from __future__ import annotations

import re
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml
from fastapi.routing import APIRoute
from typer.testing import CliRunner

from inferq.broker.lanes import HOLD_SECONDS
from inferq.producer.cli import app
from inferq.producer.cli.settings import variables as settings
from inferq.producer.gateway import health
from inferq.producer.up.part import free_ports
from inferq.schemas import get_type, installed_types
from tests.compose.project import FILE, FILES, project, seconds, services, variables
from tests.images.dockerfile import ROOT, images
from tests.monitoring.conftest import promtool as promtool
from tests.waiting import eventually

SERVICES = services()
IMAGES = {image.target: image for image in images()}
OTHERS = {"rabbitmq", "redis", "seaweedfs", "prometheus", "grafana"}
"""What is not inferq's own."""
OWN = {name: service for name, service in SERVICES.items() if name not in OTHERS}
PARTS = {name: service for name, service in OWN.items() if name != "bucket"}
TYPES = {"ocr", "ner", "facefusion", "acestep", "echo"}
WORKERS = {name: service for name, service in PARTS.items() if name.removesuffix("-gpu") in TYPES}

each = pytest.mark.parametrize("name", SERVICES)
each_part = pytest.mark.parametrize("name", PARTS)
each_worker = pytest.mark.parametrize("name", WORKERS)


def target(service: dict[str, Any]) -> str:
    """The Dockerfile's target that is a service's image."""
    found = re.fullmatch(r"inferq-([\w-]+):latest", service["image"])
    assert found, service["image"]
    return found[1]


def arguments(service: dict[str, Any]) -> list[str]:
    """What a part's container runs, after `inferq`."""
    image = IMAGES[target(service)]
    return [*image.entry_point[1:], *service.get("command", image.arguments)]


def test_the_file_is_valid_by_the_schema_of_the_compose_specification() -> None:
    command = [
        sys.executable,
        "-P",
        "-m",
        "check_jsonschema",
        "--builtin-schema",
        "vendor.compose-spec",
        str(FILE),
    ]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


def test_no_key_depends_on_the_order_of_merges() -> None:
    # Implementations differ in which of two merged mappings wins.
    assert "<<: [" not in FILE.read_text("utf-8")


def test_every_part_and_every_task_type_runs_once() -> None:
    own = {name for name, kind in installed_types().items() if kind.distribution == "inferq"}
    assert own >= TYPES
    started = {name: " ".join(arguments(service)) for name, service in PARTS.items()}
    assert started == {
        "gateway": "gateway",
        "callbacks": "callbacks --queues callbacks",
        "batches": "callbacks --queues batches",
        "beat": "beat",
        "monitor": "monitor",
        **{name: f"worker {name.removesuffix('-gpu')}" for name in WORKERS},
    }
    assert {name.removesuffix("-gpu") for name in WORKERS} == TYPES


def test_every_image_is_built_once_from_its_target() -> None:
    built = {name: service["build"] for name, service in OWN.items() if "build" in service}
    assert sorted(build["target"] for build in built.values()) == sorted(IMAGES)
    for name, build in built.items():
        assert build["target"] == target(SERVICES[name])
    # The others use an image that is built here, and never one of that name from elsewhere.
    for name in OWN.keys() - built.keys():
        assert target(SERVICES[name]) in IMAGES
        assert SERVICES[name]["pull_policy"] == "never"


def test_images_of_others_have_a_version() -> None:
    for name in OTHERS:
        assert re.search(r":v?\d+\.\d+(\.\d+)?(-alpine)?$", SERVICES[name]["image"])


def test_profiles_choose_the_workers_and_monitoring() -> None:
    profiles = {name: service.get("profiles", []) for name, service in SERVICES.items()}
    chosen = {name for name, given in profiles.items() if given}
    assert {name for name in chosen if profiles[name] == ["gpu"]} == {
        n for n in WORKERS if n.endswith("-gpu")
    }
    assert {name for name in chosen if profiles[name] == ["cpu"]} == TYPES - {"echo"}
    assert {name for name in chosen if profiles[name] == ["monitoring"]} == {"prometheus", "grafana"}
    assert chosen == {name for name, given in profiles.items() if given in (["cpu"], ["gpu"], ["monitoring"])}


def test_gpu_workers_reserve_a_gpu_and_the_others_none() -> None:
    for name, service in SERVICES.items():
        if not name.endswith("-gpu"):
            assert "deploy" not in service
            continue
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device == {"driver": "nvidia", "device_ids": ["0"], "capabilities": ["gpu"]}
        assert IMAGES[target(service)].environment["INFERQ_DEVICE"] == "cuda"


@each
def test_a_service_has_few_rights_and_starts_again(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["restart"] == ("on-failure" if name == "bucket" else "unless-stopped")
    assert service["logging"]["options"].keys() == {"max-size", "max-file"}
    assert "privileged" not in service
    assert ("cap_add" in service) == (name == "seaweedfs")
    for volume in service.get("volumes", []):
        source, _, where = volume.partition(":")
        assert source in project()["volumes"] or (where.endswith(":ro") and (ROOT / source).exists())


def test_only_the_gateway_and_grafana_publish_a_port_and_only_on_loopback() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert published == {"gateway": ["127.0.0.1:8000:8000"], "grafana": ["127.0.0.1:3000:3000"]}
    assert IMAGES["gateway"].environment["INFERQ_GATEWAY_PORT"] == "8000"


def test_databases_are_in_a_network_without_the_internet() -> None:
    assert project()["networks"] == {"inside": {"internal": True}, "outside": None}
    for name, service in SERVICES.items():
        assert "inside" in service["networks"]
        inner = OTHERS - {"grafana"} | {"bucket", "beat", "monitor"}
        assert ("outside" in service["networks"]) == (name not in inner)


@each_part
def test_a_part_starts_once_its_services_can_be_used(name: str) -> None:
    conditions = {other: given["condition"] for other, given in PARTS[name]["depends_on"].items()}
    assert conditions == {
        "rabbitmq": "service_healthy",
        "redis": "service_healthy",
        "bucket": "service_completed_successfully",
    }
    assert SERVICES["bucket"]["depends_on"] == {"seaweedfs": {"condition": "service_healthy"}}
    for other in ("rabbitmq", "redis", "seaweedfs"):
        assert SERVICES[other]["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL")


@each_part
def test_a_part_is_healthy_when_it_is_ready(name: str) -> None:
    image, check = IMAGES[target(PARTS[name])], PARTS[name]["healthcheck"]
    port = image.last("EXPOSE")
    found = re.search(r"urlopen\('http://127\.0\.0\.1:(\d+)(/\w+)', timeout=(\d+)\)", check["test"][-1])
    assert found
    assert (found[1], found[2]) == (port, "/readyz")
    assert int(found[3]) < seconds(check["timeout"])
    if name == "gateway":
        assert "/readyz" in {route.path for route in health.router.routes if isinstance(route, APIRoute)}
    else:
        assert "/readyz" in (ROOT / "schemas/probe_server.py").read_text("utf-8")


@each_worker
def test_a_worker_may_finish_its_run(name: str) -> None:
    limit = get_type(name.removesuffix("-gpu")).time_limit
    service = WORKERS[name]
    assert int(service["environment"]["INFERQ_GRACE_SECONDS"]) == limit + 30
    assert seconds(service["stop_grace_period"]) == limit + 90


def test_other_services_stop_after_their_own_grace() -> None:
    defaults = {each.name: each.default for each in settings()}
    least = {
        "gateway": float(defaults["INFERQ_SHUTDOWN_GRACE"]),
        "callbacks": float(defaults["INFERQ_CALLBACK_TIMEOUT"]),
        "batches": float(defaults["INFERQ_BATCH_SLICE"]),
    }
    for name, grace in least.items():
        assert seconds(SERVICES[name]["stop_grace_period"]) > grace
    assert all("stop_grace_period" in service for name, service in SERVICES.items() if name != "bucket")


@each_part
def test_a_part_accepts_its_settings(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    service, image = PARTS[name], IMAGES[target(PARTS[name])]
    given = image.environment | service["environment"]
    known = {each.name for each in settings()} | {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"}
    assert service["environment"].keys() <= known
    env = {key: value for key, value in given.items() if key.startswith(("INFERQ_", "AWS_"))}
    if name == "beat":
        assert service["volumes"] == ["./deploy/compose/schedules:/schedules:ro"]
        env["INFERQ_SCHEDULES_FILE"] = env["INFERQ_SCHEDULES_FILE"].replace(
            "/schedules/", f"{FILES}/schedules/"
        )
    monkeypatch.chdir(tmp_path)
    # Only the GPU and the engines of GPU images are not here.
    monkeypatch.setattr("inferq.consumers.runtime.child.gpu_fault", lambda number: None)
    ended = CliRunner().invoke(app, [*arguments(service), "--check"], env=env)
    assert ended.exit_code == 0, ended.output + str(ended.exception)


def test_files_that_parts_write_are_in_volumes_of_their_user() -> None:
    made = IMAGES["gateway"].history
    assert any(word == "RUN" and "chown 65532:65532 /data" in arguments for word, arguments in made)
    for name, setting in (("gateway", "INFERQ_API_KEYS_FILE"), ("callbacks", "INFERQ_WEBHOOK_SECRETS_FILE")):
        assert SERVICES[name]["environment"][setting].startswith("/data/")
        (volume,) = SERVICES[name]["volumes"]
        assert volume.endswith(":/data")
    for name in WORKERS.keys() - {"echo"}:
        assert SERVICES[name]["volumes"] == ["weights:/weights"]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "deploy" / "compose"
    folder.mkdir(parents=True)
    (folder / "secrets.sh").write_bytes((FILES / "secrets.sh").read_bytes())
    return tmp_path


def test_one_command_makes_the_passwords_and_keeps_those_that_are_there(checkout: Path) -> None:
    def run() -> dict[str, str]:
        subprocess.run(["sh", "deploy/compose/secrets.sh"], cwd=checkout, check=True, capture_output=True)
        lines = (checkout / ".env").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines)

    (checkout / ".env").write_text("TAG=0.1.0\nREDIS_PASSWORD=kept\n")
    made = run()
    assert stat.S_IMODE((checkout / ".env").stat().st_mode) == 0o600
    assert made["REDIS_PASSWORD"] == "kept"
    assert made["COMPOSE_PROFILES"] == "cpu"
    required = {name for name, default in variables().items() if default is None}
    assert required == made.keys() - {"TAG", "COMPOSE_PROFILES"}
    drawn = [value for name, value in made.items() if name in required - {"REDIS_PASSWORD"}]
    assert all(re.fullmatch("[0-9a-f]{48}", value) for value in drawn)
    assert len(set(drawn)) == 3
    assert run() == made


def test_the_passwords_are_never_committed_and_in_no_image() -> None:
    ignored = (ROOT / ".gitignore").read_text("utf-8").splitlines()
    assert "/.env" in ignored
    assert (ROOT / ".dockerignore").read_text("utf-8").splitlines()[0] == "*"
    if (ROOT / ".git").exists():  # a file that was added before it was ignored stays
        tracked = subprocess.run(
            ["git", "ls-files", ".env"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert tracked.stdout == ""


def test_rabbitmq_lets_a_worker_hold_its_task() -> None:
    assert f"consumer_timeout = {HOLD_SECONDS * 1000}\n" in (FILES / "rabbitmq.conf").read_text("utf-8")


@pytest.fixture
def compose_redis(tmp_path: Path) -> Iterator[int]:
    """Redis by the service's own command, on a port and in a folder of the test."""
    shell, option, script = services()["redis"]["command"]
    (port,) = free_ports(1)
    assert "dir /data\n" in script
    script = script.replace("dir /data\n", f"dir {tmp_path}\nport {port}\nbind 127.0.0.1\n")
    process = subprocess.Popen(
        [shell, option, script],
        env={"PATH": "/usr/bin:/bin", "REDISCLI_AUTH": "planted", "MAXMEMORY": "64mb"},
        stdout=subprocess.DEVNULL,
    )
    yield port
    process.terminate()
    process.wait(20)


def test_redis_wants_its_password_and_drops_no_key(compose_redis: int) -> None:
    client = redis.Redis(port=compose_redis, password="planted")

    def answers() -> bool:
        try:
            return bool(client.ping())
        except redis.ConnectionError:
            return False

    eventually(answers, what="Redis")
    with pytest.raises(redis.AuthenticationError):
        redis.Redis(port=compose_redis).ping()
    assert client.config_get("maxmemory*")["maxmemory-policy"] == "noeviction"
    assert client.config_get("maxmemory")["maxmemory"] == str(64 << 20)
    assert client.config_get("appendonly")["appendonly"] == "yes"


def test_prometheus_reads_every_part() -> None:
    (job,) = yaml.safe_load((FILES / "prometheus.yml").read_text("utf-8"))["scrape_configs"]
    assert job["job_name"] == "inferq"
    read = {name: search["port"] for search in job["dns_sd_configs"] for name in search["names"]}
    assert read == {name: int(IMAGES[target(service)].last("EXPOSE")) for name, service in PARTS.items()}


def test_prometheus_accepts_its_configuration(promtool: Callable[..., str], tmp_path: Path) -> None:
    config = yaml.safe_load((FILES / "prometheus.yml").read_text("utf-8"))
    mounts = dict(volume.split(":")[1::-1] for volume in SERVICES["prometheus"]["volumes"])
    assert config["rule_files"] == ["/etc/prometheus/rules.yaml"]
    config["rule_files"] = [str(ROOT / mounts["/etc/prometheus/rules.yaml"])]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    promtool("check", "config", tmp_path / "prometheus.yml")


def test_grafana_reads_the_boards_from_where_they_are_mounted() -> None:
    mounts = dict(volume.split(":")[1::-1] for volume in SERVICES["grafana"]["volumes"])
    (source,) = yaml.safe_load((FILES / "grafana/datasources.yaml").read_text("utf-8"))["datasources"]
    (provider,) = yaml.safe_load((FILES / "grafana/dashboards.yaml").read_text("utf-8"))["providers"]
    assert source["url"] == "http://prometheus:9090"
    assert list((ROOT / mounts[provider["options"]["path"]]).glob("*.json"))
    for kind in ("datasources", "dashboards"):
        assert (
            mounts[f"/etc/grafana/provisioning/{kind}/inferq.yaml"] == f"./deploy/compose/grafana/{kind}.yaml"
        )


def test_the_page_names_every_variable_volume_and_service() -> None:
    page = (ROOT / "docs/deploy/compose.md").read_text("utf-8")
    rows = {
        cell for line in page.splitlines() if line.startswith("|") for cell in re.findall("`([^`]+)`", line)
    }
    assert variables().keys() | {"COMPOSE_PROFILES"} <= rows
    assert {f"inferq_{volume}" for volume in project()["volumes"]} <= rows
    assert {name for name in SERVICES if not name.endswith("-gpu")} <= rows
    assert project()["name"] == "inferq"
