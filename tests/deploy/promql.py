"""The board, the rules and Prometheus' own tools, for the tests that need them."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
BOARD = ROOT / "deploy/grafana/dashboards/dvd.json"
RULES = ROOT / "deploy/prometheus/rules.yaml"


def tool(name: str) -> str:
    """The path of `prometheus` or `promtool`; the test is skipped where there is none."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"no {name} on the PATH: apt-get install prometheus")
    return found


def panels() -> list[dict[str, Any]]:
    """Those that draw something."""
    return [panel for panel in json.loads(BOARD.read_text())["panels"] if panel["type"] != "row"]


def queries(interval: str = "1m") -> dict[str, str]:
    """Every expression of the board, by panel and legend, Grafana's variable replaced."""
    return {
        f"{panel['title']}: {target['legendFormat']}": target["expr"].replace("$__rate_interval", interval)
        for panel in panels()
        for target in panel["targets"]
    }


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def metrics(expression: str) -> set[str]:
    """Of ours, that an expression reads."""
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in re.findall(r"\bdvd_\w+", expression)}
