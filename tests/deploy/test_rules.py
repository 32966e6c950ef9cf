"""The alerting rules are complete, tested by promtool, and documented in docs/troubleshooting.md."""

import re
import subprocess
from typing import Any

import pytest
import yaml

from tests.deploy.promql import ROOT, RULES, find_tool, rules

TESTS = RULES.with_name("rules.test.yaml")
HEADINGS = re.findall(r"^## (.+)$", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_a_rule_has_severity_annotations_and_a_runbook(rule: dict[str, Any]) -> None:
    assert re.fullmatch(r"\d+m", rule["for"])
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert set(rule["annotations"]) == {"summary", "description", "runbook"}
    page, _, anchor = rule["annotations"]["runbook"].partition("#")
    assert page == "docs/troubleshooting.md"
    assert anchor in [heading.lower().replace(" ", "-") for heading in HEADINGS]
    section = (ROOT / page).read_text().partition(f"## {anchor.replace('-', ' ').capitalize()}")[2].partition("\n## ")[0]
    assert re.search(rf"\*Alerts?\* .*\b{rule['alert']}\b", section, re.IGNORECASE), "the section must name the alert"


def test_each_rule_has_a_case_that_fires_and_one_that_does_not() -> None:
    cases = [case for test in yaml.safe_load(TESTS.read_text())["tests"] for case in test["alert_rule_test"]]
    names = {rule["alert"] for rule in rules()}
    assert {case["alertname"] for case in cases if case.get("exp_alerts")} == names
    assert {case["alertname"] for case in cases if not case.get("exp_alerts")} == names


def test_rules_pass_promtools_tests() -> None:
    command = [find_tool("promtool"), "test", "rules", TESTS.name]
    result = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "SUCCESS" in result.stdout + result.stderr
