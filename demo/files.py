"""How JSON is written here."""

import json
from pathlib import Path
from typing import Any


def write_json(file: Path, value: Any) -> None:
    """For people too: indented, in UTF-8, with a last line's end. The folder is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
