"""The Grafana dashboard is complete, and its expressions are valid PromQL over metrics that exist."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.deploy.promql import DASHBOARD, ROOT, find_tool, metrics, panels, queries, rules

DOCUMENTED_METRICS = set(re.findall(r"^\| `(dvd_\w+)` \|", (ROOT / "docs/metrics.md").read_text(), re.MULTILINE))


def test_panels_have_what_grafana_and_a_reader_need() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    assert [variable["name"] for variable in dashboard["templating"]["list"]] == ["datasource"]
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in panels():
        assert panel["title"], panel["id"]
        assert panel["description"].endswith("."), panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert all(target["legendFormat"] for target in panel["targets"]), panel["title"]
    titles = [panel["title"] for panel in panels()]
    assert len(set(titles)) == len(titles)


def test_panels_do_not_overlap() -> None:
    occupied: set[tuple[int, int]] = set()
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not occupied & cells, panel["title"]
        occupied |= cells


@pytest.mark.parametrize(
    ("where", "expression"),
    [*queries().items(), *((rule["alert"], rule["expr"]) for rule in rules())],
    ids=lambda text: text[:40],
)
def test_expressions_read_documented_metrics(where: str, expression: str) -> None:
    names = metrics(expression)
    assert names <= DOCUMENTED_METRICS, where
    assert names or "up{" in expression, where


def test_every_metric_is_on_the_dashboard() -> None:
    """Except build and model information, and totals that another panel's metric contains."""
    displayed = set().union(*map(metrics, queries().values()))
    assert DOCUMENTED_METRICS - displayed == {
        "dvd_build_info", "dvd_model_info", "dvd_sink_embeddings", "dvd_sink_received_bytes_total",
        "dvd_vision_images_total", "dvd_vision_tiles_total",
    }  # fmt: skip


def test_expressions_are_valid_promql(tmp_path: Path) -> None:
    recording_rules = [{"record": f"a:{index}", "expr": expression} for index, expression in enumerate(queries().values())]
    file = tmp_path / "dashboard.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": recording_rules}]}))
    command = [find_tool("promtool"), "check", "rules", str(file)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{len(recording_rules)} rules found" in result.stdout
