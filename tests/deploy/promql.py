"""The dashboard, the alerting rules and Prometheus' own tools, for the tests that need them."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "deploy/grafana/dashboards/dvd.json"
RULES = ROOT / "deploy/prometheus/rules.yaml"


def find_tool(name: str) -> str:
    """Return the path of `prometheus` or `promtool`. Skips the test if it is not installed."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not on the PATH: apt-get install prometheus")
    return path


def panels() -> list[dict[str, Any]]:
    """Return the dashboard's panels, without the rows that group them."""
    return [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]


def queries(interval: str = "1m") -> dict[str, str]:
    """Return every expression of the dashboard by panel and legend, with Grafana's variable replaced."""
    return {
        f"{panel['title']}: {target['legendFormat']}": target["expr"].replace("$__rate_interval", interval)
        for panel in panels()
        for target in panel["targets"]
    }


def rules() -> list[dict[str, Any]]:
    """Return the alerting rules of all groups."""
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def metrics(expression: str) -> set[str]:
    """Return the metrics of dvd-serve that an expression reads."""
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in re.findall(r"\bdvd_\w+", expression)}
