"""The alert rules: when they fire, what they say, and the same for Kubernetes."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import yaml
from starlette.routing import Route

from inferq.producer.gateway import health
from k8s.monitoring.observe import ROOT, RULES
from tests.monitoring.content import alerts

TESTS = RULES.with_name("rules.test.yaml")
RUNBOOKS = ROOT / "docs/runbooks"


def test_alerts_fire_and_do_not_fire_as_the_cases_say(promtool: Callable[..., str]) -> None:
    assert "SUCCESS" in promtool("test", "rules", TESTS)


def test_rules_are_valid(promtool: Callable[..., str]) -> None:
    assert f"{len(alerts())} rules found" in promtool("check", "rules", "--lint=all", "--lint-fatal", RULES)


def test_each_alert_has_a_case_that_fires_and_one_that_does_not() -> None:
    cases = [
        (case["alertname"], bool(case["exp_alerts"]))
        for test in yaml.safe_load(TESTS.read_text("utf-8"))["tests"]
        for case in test["alert_rule_test"]
    ]
    assert set(cases) == {(rule["alert"], fires) for rule in alerts() for fires in (True, False)}


def test_the_alert_on_failing_requests_leaves_out_every_route_of_probes() -> None:
    (rule,) = (rule for rule in alerts() if rule["alert"] == "InferqRequestsFailing")
    left_out = {name for names in re.findall(r'route!~"(.*?)"', rule["expr"]) for name in names.split("|")}
    assert left_out == {route.path for route in health.router.routes if isinstance(route, Route)} | {
        "unmatched"
    }
    assert rule["expr"].count("inferq_http_requests_total{") == rule["expr"].count("route!~")


@pytest.mark.parametrize("rule", alerts(), ids=lambda rule: rule["alert"])
def test_an_alert_says_what_is_wrong_and_names_its_runbook(rule: dict) -> None:
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert rule["for"]
    assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
    page = (ROOT / rule["annotations"]["runbook_url"]).read_text("utf-8")
    assert rule["alert"] in page
    headings = [line for line in page.splitlines() if line.startswith("## ")]
    assert headings == ["## See it", "## Why it happens", "## What to do"]


def test_each_runbook_is_for_an_alert() -> None:
    named = {ROOT / rule["annotations"]["runbook_url"] for rule in alerts()}
    assert named == set(RUNBOOKS.glob("*.md"))


def test_the_resource_for_kubernetes_has_the_same_rules() -> None:
    resource = yaml.safe_load(RULES.with_name("prometheusrule.yaml").read_text("utf-8"))
    assert (resource["apiVersion"], resource["kind"]) == ("monitoring.coreos.com/v1", "PrometheusRule")
    assert resource["spec"] == yaml.safe_load(RULES.read_text("utf-8"))
