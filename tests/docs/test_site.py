"""The documentation builds into a site without a warning, and a dead link is an error."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def build(config: Path, site: Path) -> "subprocess.CompletedProcess[str]":
    """Build the site as `make docs` does, into another folder."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", f"--config-file={config}", f"--site-dir={site}"]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_the_site_builds_and_has_the_pages_from_outside_docs(tmp_path: Path) -> None:
    result = build(ROOT / "mkdocs.yml", tmp_path / "site")
    assert result.returncode == 0, result.stdout + result.stderr
    for page in ("index", "api/index", "security/index", "changelog/index", "deploy/index", "demo/index", "contributing/index"):
        assert (tmp_path / "site" / f"{page}.html").is_file(), page
    overview = (tmp_path / "site/index.html").read_text()
    assert 'href="api/"' in overview, "links to docs/ lead to pages of the site"
    assert (tmp_path / "site/benchmarks/results/ratios.png").is_file(), "images outside docs/ are copied"


@pytest.mark.parametrize(
    ("link", "problem"),
    [
        ("[page](missing.md)", "missing.md"),
        ("[file](../deploy/missing.yaml)", "../deploy/missing.yaml"),
        ("[section](#missing)", "#missing"),
        ("[section](other.md#missing)", "#missing"),
        ("[fine](../Makefile), [also](other.md#present), `[not a link](missing.md)`", None),
    ],
)
def test_a_dead_link_is_an_error(tmp_path: Path, link: str, problem: str | None) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/page.md").write_text(f"# Page\n\n{link}\n")
    (tmp_path / "docs/other.md").write_text("# Other\n\n## Present\n")
    config = tmp_path / "mkdocs.yml"
    config.write_text(
        f"INHERIT: {ROOT}/mkdocs.yml\nnav: [page.md, other.md]\nnot_in_nav: '*'\nhooks: [{ROOT}/docs/hooks/repository.py]\n"
        "extra: {pages: {index.md: LICENSE}}\ntheme: {name: null, custom_dir: theme}\nplugins: []\n"
    )
    (tmp_path / "theme").mkdir()
    (tmp_path / "theme/main.html").write_text("{{ page.content }}")
    result = build(config, tmp_path / "site")
    output = result.stdout + result.stderr
    if problem is None:
        assert result.returncode == 0, output
        assert "https://github.com/dvd-serve/dvd-serve/blob/main/Makefile" in (tmp_path / "site/page/index.html").read_text()
    else:
        assert result.returncode == 1, output
        assert problem in output
