"""MkDocs hook: files of the repository that lie outside docs/ as pages, and links as GitHub resolves them.

Markdown here links to files relative to itself, which GitHub follows. On the site, a link to a page goes to that page, an
image is copied, and a link to any other file of the repository goes to GitHub. A link to a file that does not exist is left
as it is, and MkDocs reports it.
"""

import os
import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
_LINK = re.compile(r"(?<!`)(!?\[[^\]]*\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
_FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of `extra.pages` and the images they and other pages show from outside docs/."""
    pages: dict[str, str] = config.extra["pages"]
    for page, source in pages.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for image in (*ROOT.glob("benchmarks/results/**/*.png"), *ROOT.glob("demo/images/*.png")):
        source = image.relative_to(ROOT).as_posix()
        files.append(File.generated(config, source, abs_src_path=str(image)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite the links of a page, outside code blocks."""
    pages: dict[str, str] = config.extra["pages"]
    source = pages.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    parts = _FENCE.split(markdown)
    return "".join(
        part if _FENCE.fullmatch(part) else _LINK.sub(lambda match: _resolve(match, source, page, config, files), part)
        for part in parts
    )


def _resolve(match: "re.Match[str]", source: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    start, target, end = match.groups()
    if ":" in target or target.startswith("/"):
        return match[0]
    path = os.path.normpath(PurePosixPath(source).parent / target)
    names = {file: name for name, file in config.extra["pages"].items()}
    uri = names.get(path) or names.get(f"{path}/README.md") or path.removeprefix("docs/")
    if files.get_file_from_path(uri):
        relative = os.path.relpath(uri, PurePosixPath(page.file.src_uri).parent)
        return f"{start}{relative}{end}"
    if (ROOT / path).exists() and ROOT in (ROOT / path).resolve().parents:
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        return f"{start}{config.repo_url}/{kind}/main/{path}{end}"
    return match[0]
