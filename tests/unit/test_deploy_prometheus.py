"""The Prometheus configuration and its rules, as promtool sees them, and against the documentation."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PROMETHEUS = ROOT / "deploy/prometheus"
PAGE = (ROOT / "docs/operations.md").read_text()

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (apt install prometheus)"
)


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def records() -> list[dict[str, Any]]:
    groups = yaml.safe_load((PROMETHEUS / "rules.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def cases() -> list[dict[str, Any]]:
    tests = yaml.safe_load((PROMETHEUS / "alerts_test.yml").read_text())["tests"]
    return [case for test in tests for case in test["alert_rule_test"]]


def promtool(*args: str) -> None:
    done = subprocess.run(["promtool", *args], cwd=PROMETHEUS, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_the_configuration_is_valid() -> None:
    promtool("check", "config", "--syntax-only", "prometheus.yml")
    promtool("check", "rules", "rules.yml", "alerts.yml")


@needs_promtool
def test_alerts_fire_when_they_should_and_only_then() -> None:
    promtool("test", "rules", "alerts_test.yml")


def test_every_alert_is_tested_firing_and_silent() -> None:
    names = {rule["alert"] for rule in alerts()}
    assert {case["alertname"] for case in cases() if case.get("exp_alerts")} == names
    assert {case["alertname"] for case in cases() if not case.get("exp_alerts")} == names


@pytest.mark.parametrize("rule", alerts(), ids=lambda rule: rule["alert"])
def test_every_alert_has_a_severity_and_a_runbook(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    assert set(rule["annotations"]) == {"summary", "description", "runbook"}
    page, _, anchor = rule["annotations"]["runbook"].partition("#")
    assert page == "docs/operations.md"
    headings = re.findall(r"^### (.+)$", PAGE, flags=re.M)
    assert anchor in {heading.lower().replace(" ", "-") for heading in headings}
    assert f"| `{rule['alert']}` | {rule['labels']['severity']} |" in PAGE


def test_the_page_lists_no_alert_that_does_not_exist() -> None:
    listed = re.findall(r"^\| `(Quire\w+)` \|", PAGE, flags=re.M)
    assert listed == [rule["alert"] for rule in alerts()]


def test_alerts_use_recordings_that_exist_and_each_is_used_or_a_percentile() -> None:
    made = {rule["record"] for rule in records()}
    used = set(re.findall(r"\b[a-z_]+:[a-z_]+:\w+", " ".join(rule["expr"] for rule in alerts())))
    assert used <= made
    assert made - used == {"instance:quire_inter_token_seconds:p95_rate5m"}


def test_recordings_are_named_after_what_they_keep_apart() -> None:
    for rule in records():
        level = rule["record"].split(":")[0]
        kept = set(re.search(r"sum by \(([^)]*)\)", rule["expr"]).group(1).split(", ")) - {"le"}  # type: ignore[union-attr]
        assert level == "_".join(sorted(kept)), rule["record"]
