"""docs/planning.md lists every key of a plan's file, with its unit, default and meaning."""

import re
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from dvd.plan.file import PlanFile
from dvd.plan.model import Costs, Kind, LanguageCosts, Limits, Load, VisionCosts

PARTS: dict[str, type[BaseModel]] = {
    "costs": Costs, "vision": VisionCosts, "language": LanguageCosts, "load": Load, "limits": Limits, "kinds": Kind,
}  # fmt: skip
ROW = re.compile(r"^\| `((?:costs|load)\.[\w.]+)` \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", re.MULTILINE)


def rows(part: type[BaseModel], path: str = "") -> Iterator[tuple[str, str, str, str]]:
    for name, field in part.model_fields.items():
        key = f"{path}.{name}".lstrip(".")
        if name == "kinds":
            yield key, "list", "one entry", str(field.description)
        if name in PARTS:
            yield from rows(PARTS[name], key)
        else:
            default = "required" if field.default is PydanticUndefined else f"`{field.default}`"
            assert isinstance(field.json_schema_extra, dict)
            yield key, str(field.json_schema_extra["unit"]), default, str(field.description)


def test_the_table_has_every_key() -> None:
    documented = ROW.findall((Path(__file__).parents[2] / "docs/planning.md").read_text())
    assert documented == list(rows(PlanFile))
