"""What `make observe` adds to `inferq up`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from inferq.producer.up.folder import DataFolder
from inferq.producer.up.part import Part
from inferq.producer.up.plan import Plan
from inferq.schemas import InstallationError
from k8s.monitoring import observe


def part(name: str, *argv: str, **env: str) -> Part:
    return Part(name, ("program", *argv), env, lambda: None)


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """The programs that this machine has, by name."""
    there: dict[str, Path] = {}
    monkeypatch.setattr(observe, "find_program", lambda name, folders=(): there.get(name))
    return there


@pytest.fixture
def plan() -> Plan:
    cli = ("-m", "inferq.producer.cli")
    parts = (
        part("redis", "redis.conf", INFERQ_PROBE_PORT="1"),
        part("gateway", *cli, "gateway", INFERQ_PROBE_PORT="1"),  # the shell's own
        part("worker-ocr", *cli, "worker", "ocr", INFERQ_PROBE_PORT="9001"),
        part("monitor", *cli, "monitor", INFERQ_PROBE_PORT="9002"),
    )
    return Plan(parts, {"INFERQ_API_URL": "http://127.0.0.1:8000"}, {"data": "here"})


def test_prometheus_reads_the_metrics_of_each_part(
    plan: Plan, programs: dict[str, Path], tmp_path: Path, promtool: Callable[..., str]
) -> None:
    programs["prometheus"] = Path("/usr/bin/prometheus")
    more = observe.with_monitoring(DataFolder(tmp_path), plan)
    assert [each.name for each in more.parts] == [*(each.name for each in plan.parts), "prometheus"]
    config = tmp_path / "prometheus" / "prometheus.yml"
    (jobs,) = json.loads(config.read_text())["scrape_configs"]
    targets = {each["labels"]["part"]: each["targets"] for each in jobs["static_configs"]}
    assert targets == {
        "worker-ocr": ["127.0.0.1:9001"],
        "monitor": ["127.0.0.1:9002"],
        "gateway": ["127.0.0.1:8000"],
    }
    assert "1 rule files found" in promtool("check", "config", config)
    assert f"--config.file={config}" in more.parts[-1].argv
    assert any(each.startswith("--web.listen-address=127.0.0.1:") for each in more.parts[-1].argv)


def test_where_grafana_is_missing_it_says_how_to_load_the_boards(
    plan: Plan, programs: dict[str, Path], tmp_path: Path
) -> None:
    programs["prometheus"] = Path("/usr/bin/prometheus")
    facts = observe.with_monitoring(DataFolder(tmp_path), plan).facts
    assert facts["data"] == "here"
    assert "import k8s/monitoring/dashboards/*.json" in facts["grafana"]


def test_grafana_loads_the_boards_and_lets_nobody_change_them(
    plan: Plan, programs: dict[str, Path], tmp_path: Path
) -> None:
    home = tmp_path / "grafana-12"
    (home / "public").mkdir(parents=True)
    programs |= {"prometheus": Path("/usr/bin/prometheus"), "grafana": home / "bin/grafana"}
    more = observe.with_monitoring(DataFolder(tmp_path / "data"), plan)
    grafana = more.parts[-1]
    assert grafana.argv == (str(home / "bin/grafana"), "server", "--homepath", str(home))
    assert grafana.env["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"
    assert len(grafana.env["GF_SECURITY_ADMIN_PASSWORD"]) > 20
    folder = Path(grafana.env["GF_PATHS_PROVISIONING"])
    (boards,) = json.loads((folder / "dashboards/inferq.yaml").read_text())["providers"]
    assert boards["options"]["path"] == str(observe.BOARDS)
    (source,) = json.loads((folder / "datasources/inferq.yaml").read_text())["datasources"]
    assert f"--web.listen-address={source['url'].removeprefix('http://')}" in more.parts[-2].argv


def test_without_prometheus_nothing_starts(plan: Plan, programs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InstallationError, match="make prometheus"):
        observe.with_monitoring(DataFolder(tmp_path), plan)
