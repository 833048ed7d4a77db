"""`make observe`: `inferq up`, with a Prometheus beside it that reads all metrics and evaluates the rules.

If there is a `grafana` on PATH, it starts too and loads the boards. Both listen on loopback, keep their data in the
data folder, and stop with everything else. For trying the rules and the boards, not for production.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from inferq.producer.cli.output import console
from inferq.producer.cli.up import Screen
from inferq.producer.up.folder import DataFolder
from inferq.producer.up.foreground import UpOptions, run_until_stopped
from inferq.producer.up.part import LOOPBACK, Part, find_program, kept_secret
from inferq.producer.up.plan import Plan, choose_types, http_ready
from inferq.schemas import InferqError, InstallationError

ROOT = Path(__file__).parents[2]
RULES = ROOT / "k8s/monitoring/rules.yaml"
BOARDS = ROOT / "k8s/monitoring/dashboards"
UNPACKED = ROOT / ".make/prometheus"
"""Debian's package, as `make prometheus` unpacks it."""


def metrics_ports(plan: Plan) -> dict[str, int]:
    """The port at which each part serves `/metrics`, by the part's name."""
    ports = {
        part.name: int(part.env["INFERQ_PROBE_PORT"])
        for part in plan.parts
        if "inferq.producer.cli" in part.argv and "INFERQ_PROBE_PORT" in part.env
    }
    gateway = urlsplit(plan.variables["INFERQ_API_URL"]).port
    return ports | ({"gateway": gateway} if gateway else {})


def prometheus_config(ports: Mapping[str, int]) -> dict[str, Any]:
    """Prometheus' configuration for the parts with these ports. It is JSON, so it is YAML too."""
    return {
        "global": {"scrape_interval": "5s", "evaluation_interval": "5s"},
        "rule_files": [str(RULES)],
        "scrape_configs": [
            {
                "job_name": "inferq",
                "static_configs": [
                    {"targets": [f"{LOOPBACK}:{port}"], "labels": {"part": name}}
                    for name, port in ports.items()
                ],
            }
        ],
    }


def with_monitoring(folder: DataFolder, plan: Plan) -> Plan:
    """The plan with Prometheus, and with Grafana if it is installed.

    Raises InstallationError (`no_prometheus`) if there is no Prometheus.
    """
    ports = folder.ports(["prometheus-web", "grafana"])
    parts = [_prometheus(folder.path / "prometheus", ports["prometheus-web"], metrics_ports(plan))]
    facts = {"prometheus": f"http://{LOOPBACK}:{ports['prometheus-web']}"}
    grafana = find_program("grafana")
    if grafana is None:
        boards = os.path.relpath(BOARDS)
        facts["grafana"] = f"not on PATH; to see the boards, import {boards}/*.json into a Grafana"
    else:
        parts.append(_grafana(grafana, folder.path / "grafana", ports["grafana"], ports["prometheus-web"]))
        facts["grafana"] = f"http://{LOOPBACK}:{ports['grafana']}/dashboards"
    return replace(plan, parts=(*plan.parts, *parts), facts={**plan.facts, **facts})


def _prometheus(folder: Path, port: int, ports: Mapping[str, int]) -> Part:
    program = find_program("prometheus", [UNPACKED / "usr/bin"])
    if program is None:
        raise InstallationError(
            "there is no prometheus on PATH; put it there, or run `make prometheus` where apt-get reaches a mirror",
            code="no_prometheus",
        )
    folder.mkdir(exist_ok=True)
    config = folder / "prometheus.yml"
    config.write_text(json.dumps(prometheus_config(ports), indent=2) + "\n", encoding="utf-8")
    argv = [
        str(program),
        f"--config.file={config}",
        f"--storage.tsdb.path={folder / 'data'}",
        "--storage.tsdb.retention.time=7d",
        f"--web.listen-address={LOOPBACK}:{port}",
    ]
    if UNPACKED in program.parents:
        argv.append(f"--web.local-assets={UNPACKED}/usr/share/prometheus/web/")  # an option of Debian's
    return Part(
        name="prometheus",
        argv=tuple(argv),
        env=dict(os.environ),
        probe=lambda: http_ready(port, "/-/ready"),
        folder=folder,
    )


def _grafana(program: Path, folder: Path, port: int, prometheus: int) -> Part:
    home = next((each for each in program.resolve().parents if (each / "public").is_dir()), None)
    provisioning = {
        "datasources": {
            "apiVersion": 1,
            "datasources": [
                {
                    "name": "Prometheus",
                    "type": "prometheus",
                    "access": "proxy",
                    "url": f"http://{LOOPBACK}:{prometheus}",
                    "isDefault": True,
                }
            ],
        },
        "dashboards": {
            "apiVersion": 1,
            "providers": [{"name": "inferq", "type": "file", "options": {"path": str(BOARDS)}}],
        },
    }
    for kind, content in provisioning.items():
        file = folder / "provisioning" / kind / "inferq.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return Part(
        name="grafana",
        argv=(str(program), "server", "--homepath", str(home or "/usr/share/grafana")),
        env={
            **os.environ,
            "GF_SERVER_HTTP_ADDR": LOOPBACK,
            "GF_SERVER_HTTP_PORT": str(port),
            "GF_PATHS_DATA": str(folder / "data"),
            "GF_PATHS_LOGS": str(folder / "logs"),
            "GF_PATHS_PLUGINS": str(folder / "plugins"),
            "GF_PATHS_PROVISIONING": str(folder / "provisioning"),
            "GF_SECURITY_ADMIN_PASSWORD": kept_secret(folder / "password"),
            "GF_AUTH_ANONYMOUS_ENABLED": "true",  # it may look, and change nothing
            "GF_ANALYTICS_REPORTING_ENABLED": "false",
            "GF_ANALYTICS_CHECK_FOR_UPDATES": "false",
            "GF_ANALYTICS_CHECK_FOR_PLUGIN_UPDATES": "false",
        },
        probe=lambda: http_ready(port, "/api/health"),
        needs=("prometheus",),
        folder=folder,
        start_limit=120,
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="make observe", description=__doc__)
    parser.add_argument("--data", type=Path, default=Path(".inferq"), help="the data folder of `inferq up`")
    parser.add_argument("--port", type=int, default=8000, help="the gateway's port; 0 takes a free one")
    parser.add_argument("--types", help="task types to start a worker for, separated by commas")
    given = parser.parse_args()
    screen = Screen(console, given.data, detach=False)
    try:
        options = UpOptions(
            given.data, given.port, choose_types(given.types), required=given.types is not None
        )
        run_until_stopped(
            options,
            report=screen.report,
            when_ready=lambda plan: screen.ready(plan.facts),
            extend=with_monitoring,
        )
    except InferqError as error:
        screen.failed(error)
        return 1
    screen.stopped()
    return 0


if __name__ == "__main__":
    sys.exit(main())
