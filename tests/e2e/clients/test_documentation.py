"""The examples of docs/clients.md run as they are printed, against a server whose weights are random."""

import re
from pathlib import Path

import pytest

from tests.e2e.clients.environment import HAS_NODE, ROOT, run
from tests.e2e.serving import Served

pytestmark = pytest.mark.usefixtures("compact_tool_calls")

PAGE = (ROOT / "docs/clients.md").read_text()
IMAGE = "docs/images/red-circle.png"
SUFFIXES = {"python": ".py", "js": ".mjs"}
EXAMPLES = [
    (library, language, code)
    for library, section in re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    for language, code in re.findall(r"^```(python|js)\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    if HAS_NODE or language == "python"
]


@pytest.mark.parametrize(("library", "language", "code"), EXAMPLES, ids=[library for library, _, _ in EXAMPLES])
def test_an_example_prints_an_answer(served: Served, tmp_path: Path, library: str, language: str, code: str) -> None:
    assert "http://127.0.0.1:8000" in code
    assert IMAGE in code
    script = tmp_path / f"example{SUFFIXES[language]}"
    script.write_text(code.replace("http://127.0.0.1:8000", served.url).replace(IMAGE, str(ROOT / IMAGE)))
    assert run(script, {}).strip()


def test_the_table_links_every_example() -> None:
    linked = re.findall(r"^\| \[(.+?)\]\(#", PAGE, re.MULTILINE)
    assert set(linked) == set(re.findall(r"^## (.+)$", PAGE, re.MULTILINE))
    assert {library for library, _, _ in EXAMPLES} <= set(linked)
