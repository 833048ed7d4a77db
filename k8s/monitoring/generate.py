"""Writes the boards and prometheusrule.yaml: `python -m k8s.monitoring.generate`.

`make generate` runs it. With `--check`, as in `make lint`, it only fails if a file is stale.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from k8s.monitoring.boards import BOARDS
from k8s.monitoring.grafana import board_json

FOLDER = Path(__file__).parent
RULES = FOLDER / "rules.yaml"
_HEAD = """\
# Generated from rules.yaml by `make generate`. Change that file, not this one.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: inferq
  labels:
    app.kubernetes.io/name: inferq
spec:
"""


def prometheus_rule(rules: str) -> str:
    """The text of a file of rules as a resource of Prometheus Operator."""
    lines = rules.splitlines()
    body = lines[lines.index("groups:") :]
    return _HEAD + "".join(f"  {line}\n" if line else "\n" for line in body)


def generated() -> dict[Path, str]:
    """The text of each generated file."""
    files = {FOLDER / "dashboards" / f"{name}.json": board_json(board) for name, board in BOARDS.items()}
    return files | {FOLDER / "prometheusrule.yaml": prometheus_rule(RULES.read_text("utf-8"))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file is stale")
    check = parser.parse_args().check
    files = generated()
    stale = [path for path, text in files.items() if not path.exists() or path.read_text("utf-8") != text]
    stale += [path for path in (FOLDER / "dashboards").glob("*") if path not in files]
    if not check:
        for path in stale:
            path.write_text(files[path], "utf-8") if path in files else path.unlink()
    elif stale:
        names = ", ".join(path.name for path in stale)
        sys.stderr.write(f"{FOLDER.name} is stale ({names}); run: make generate\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
