"""The board is a board, every expression is PromQL and reads metrics that there are."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.deploy.promql import BOARD, ROOT, metrics, panels, queries, rules, tool

DOCUMENTED = set(re.findall(r"^\| `(dvd_\w+)` \|", (ROOT / "docs/metrics.md").read_text(), re.MULTILINE))


def test_panels_have_what_grafana_and_a_reader_need() -> None:
    board = json.loads(BOARD.read_text())
    assert [variable["name"] for variable in board["templating"]["list"]] == ["datasource"]
    numbers = [panel["id"] for panel in board["panels"]]
    assert len(set(numbers)) == len(numbers)
    for panel in panels():
        assert panel["title"], panel["id"]
        assert panel["description"].endswith("."), panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert all(target["legendFormat"] for target in panel["targets"]), panel["title"]
    titles = [panel["title"] for panel in panels()]
    assert len(set(titles)) == len(titles)


def test_panels_do_not_lie_on_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads(BOARD.read_text())["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert not taken & cells, panel["title"]
        taken |= cells


@pytest.mark.parametrize(
    ("where", "expression"),
    [*queries().items(), *((rule["alert"], rule["expr"]) for rule in rules())],
    ids=lambda said: said[:40],
)
def test_metrics_that_are_read_exist(where: str, expression: str) -> None:
    read = metrics(expression)
    assert read <= DOCUMENTED, where
    assert read or "up{" in expression, where


def test_every_metric_of_a_stage_is_on_the_board() -> None:
    """What is only for tables of facts is not."""
    shown = set().union(*map(metrics, queries().values()))
    assert DOCUMENTED - shown == {
        "dvd_build_info", "dvd_model_info", "dvd_sink_embeddings", "dvd_sink_received_bytes_total",
        "dvd_vision_images_total", "dvd_vision_tiles_total",
    }  # fmt: skip


def test_expressions_are_promql(tmp_path: Path) -> None:
    made = [{"record": f"a:{number}", "expr": expression} for number, expression in enumerate(queries().values())]
    file = tmp_path / "board.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "board", "rules": made}]}))
    done = subprocess.run([tool("promtool"), "check", "rules", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(made)} rules found" in done.stdout
