"""JSON files of checkpoints and results."""

import json
from pathlib import Path
from typing import Any


def write_json(file: Path, value: Any) -> None:
    """Write `value` as indented UTF-8 JSON with a final newline. Missing folders are created."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
