"""The alerts: whole, tested by promtool, and each with its entry in docs/troubleshooting.md."""

import re
import subprocess
from typing import Any

import pytest
import yaml

from tests.deploy.promql import ROOT, RULES, rules, tool

TESTS = RULES.with_name("rules.test.yaml")
HEADINGS = re.findall(r"^## (.+)$", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_a_rule_says_all_that_is_needed_at_night(rule: dict[str, Any]) -> None:
    assert re.fullmatch(r"\d+m", rule["for"])
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert set(rule["annotations"]) == {"summary", "description", "runbook"}
    page, _, anchor = rule["annotations"]["runbook"].partition("#")
    assert page == "docs/troubleshooting.md"
    assert anchor in [heading.lower().replace(" ", "-") for heading in HEADINGS]
    section = (ROOT / page).read_text().partition(f"## {anchor.replace('-', ' ').capitalize()}")[2].partition("\n## ")[0]
    assert re.search(rf"\*Alerts?\* .*\b{rule['alert']}\b", section, re.IGNORECASE), "its entry names it"


def test_each_rule_is_tested_to_fire_and_not_to() -> None:
    cases = [case for test in yaml.safe_load(TESTS.read_text())["tests"] for case in test["alert_rule_test"]]
    names = {rule["alert"] for rule in rules()}
    assert {case["alertname"] for case in cases if case.get("exp_alerts")} == names
    assert {case["alertname"] for case in cases if not case.get("exp_alerts")} == names


def test_rules_do_what_they_say() -> None:
    done = subprocess.run(
        [tool("promtool"), "test", "rules", TESTS.name], cwd=TESTS.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SUCCESS" in done.stdout + done.stderr
