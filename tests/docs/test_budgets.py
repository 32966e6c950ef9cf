"""The table of budgets in docs/security.md is up to date, and names every budget that is counted."""

import re
from pathlib import Path

from tests.docs.budgets import PAGE, page, section

SERVER = Path(__file__).parents[2] / "server"


def test_the_section_is_generated() -> None:
    assert PAGE.read_text() == page(PAGE.read_text()), "run make docs"


def test_every_budget_is_in_the_table() -> None:
    sources = "\n".join(file.read_text() for file in SERVER.rglob("*.py"))
    named = set(re.findall(r"(?:over_budget|BudgetExceeded\.of)\(\s*\"(\w+)\"", sources)) | set(
        re.findall(r'Budget\("(\w+)"', sources)
    )
    assert len(named) > 10
    documented = set(
        re.findall(r"`(\w+)`", " ".join(line.split("|")[-2] for line in section().splitlines() if "| 400 |" in line))
    )
    assert documented >= named


def test_other_sections_of_the_page_are_kept() -> None:
    text = "# Title\n\nText.\n\n## Budgets\n\nold\n\n## Next\n\nmore\n"
    assert page(text).startswith("# Title\n\nText.\n\n## Budgets\n\nGenerated")
    assert page(text).endswith("\n\n## Next\n\nmore\n")
    assert page(page(text)) == page(text)
