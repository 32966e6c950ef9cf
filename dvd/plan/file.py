"""The file of `dvd plan`: how it is read, what is wrong with a bad one, and how it is written with a comment on every key."""

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from dvd.plan.model import Costs, Kind, LanguageCosts, Limits, Load, VisionCosts

EXAMPLE_COSTS = Costs(
    vision=VisionCosts(prepare=0.004, cores=8, batch=0.002, tile=0.006, batch_tiles=32),
    language=LanguageCosts(step=0.008, request=0.001, prefill=0.00004, attention=4e-9, decode=0.0001),
    bytes_per_token=8192,
)
EXAMPLE_LOAD = Load(
    rate=20.0,
    kinds=[Kind(weight=3.0, tiles=7, text=60, output=80), Kind(images=0, text=400, output=120)],
)
_EXAMPLE_HEADER = (
    "An example for dvd plan: invented costs, and a mix of three requests with an image to one without.",
    "Measure your own: dvd plan --from http://127.0.0.1:8000 > plan.yaml",
)


class PlanFile(BaseModel):
    """The whole file."""

    model_config = ConfigDict(extra="forbid")

    costs: Costs
    load: Load = Field(default_factory=Load)


def read(text: str, overrides: Mapping[str, Mapping[str, float]]) -> PlanFile:
    """Return the costs and the load of a file.

    Args:
        text: YAML, of which JSON is a part.
        overrides: values that replace those of `load` and of `limits`, by these names.

    Raises:
        ValueError: the text is no valid plan; the message is one line that names the key, its value and what was expected.
    """
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(_describe_yaml_error(error)) from None
    if not isinstance(content, dict):
        raise ValueError("expected a mapping with the keys costs and load; dvd plan --example prints one")
    try:
        return PlanFile.model_validate(_with_overrides(content, overrides))
    except ValidationError as error:
        raise ValueError(_describe_error(_first(error.errors(include_url=False)))) from None


def _with_overrides(content: dict[Any, Any], overrides: Mapping[str, Mapping[str, float]]) -> dict[Any, Any]:
    load = content.get("load") or {}
    limits = load.get("limits") or {} if isinstance(load, dict) else None
    if not isinstance(load, dict) or not isinstance(limits, dict):
        return content  # validation reports it
    return {**content, "load": {**load, **overrides["load"], "limits": {**limits, **overrides["limits"]}}}


def _describe_yaml_error(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or " ".join(str(error).split())
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}" if mark else problem


_EXPECTATIONS = {
    "missing": "expected a value",
    "greater_than": "expected more than {gt:g}",
    "greater_than_equal": "expected at least {ge:g}",
    "less_than_equal": "expected at most {le:g}",
    "float_parsing": "expected a number",
    "float_type": "expected a number",
    "int_parsing": "expected a whole number",
    "int_type": "expected a whole number",
    "int_from_float": "expected a whole number",
    "finite_number": "expected a finite number",
    "model_type": "expected a mapping of keys",
    "list_type": "expected a list",
    "too_short": "expected at least {min_length} entry",
}
"""Expectations by type of pydantic's error, whose own messages are about inputs and models."""


def _first(errors: list[ErrorDetails]) -> ErrorDetails:
    """Return the error to report: an unknown key, which may be a required one misspelt, before a missing one."""
    return min(errors, key=lambda error: error["type"] != "extra_forbidden")


def _describe_error(error: ErrorDetails) -> str:
    if not error["loc"]:  # a key with a lone surrogate, which only YAML's escapes can write
        return f"expected keys of valid Unicode text: {error['msg']}"
    key = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        return f"{key}: unknown key; {_suggestion(error['loc'])}"
    template = _EXPECTATIONS.get(error["type"])
    expectation = template.format(**error.get("ctx", {})) if template else error["msg"]
    value = "missing" if error["type"] == "missing" else f"{error['input']!r:.80}"
    return f"{key} = {value}: {expectation}{_meaning(error['loc'])}"


def _suggestion(place: tuple[int | str, ...]) -> str:
    part = _part(place[:-1])
    known = list(part.model_fields) if part else []
    near = difflib.get_close_matches(str(place[-1]), known, n=1)
    return f"did you mean {near[0]}?" if near else f"expected {', '.join(known)}"


def _meaning(place: tuple[int | str, ...]) -> str:
    """Return unit and description of a key in parentheses, or nothing for a part."""
    part = _part(place[:-1])
    field = part.model_fields.get(str(place[-1])) if part else None
    if field is None or not isinstance(field.json_schema_extra, dict):
        return ""
    return f" ({field.json_schema_extra['unit']}; {field.description})"


def _part(place: tuple[int | str, ...]) -> type[BaseModel] | None:
    parts: dict[tuple[str, ...], type[BaseModel]] = {
        (): PlanFile, ("costs",): Costs, ("costs", "vision"): VisionCosts, ("costs", "language"): LanguageCosts,
        ("load",): Load, ("load", "kinds"): Kind, ("load", "limits"): Limits,
    }  # fmt: skip
    return parts.get(tuple(str(name) for name in place if not isinstance(name, int)))


def example() -> str:
    """Return a valid file with a comment on every key."""
    return render(EXAMPLE_COSTS, EXAMPLE_LOAD, _EXAMPLE_HEADER)


def render(costs: Costs, load: Load, header: tuple[str, ...] = (), notes: Mapping[str, str] | None = None) -> str:
    """Return a file with a comment on every key.

    Args:
        costs: costs of the stages.
        load: the requests to serve.
        header: lines of the comment at the top.
        notes: further comments, by path of the key (`vision.cores`).
    """
    lines = [f"# {line}" for line in header]
    lines += ["costs:", *_lines(costs, 1, notes or {}), "load:", *_lines(load, 1, notes or {})]
    return "\n".join(lines) + "\n"


def _lines(part: BaseModel, depth: int, notes: Mapping[str, str], path: str = "") -> Iterator[str]:
    indent = "  " * depth
    for name, field in type(part).model_fields.items():
        value = getattr(part, name)
        if isinstance(value, BaseModel):
            yield f"{indent}{name}:"
            yield from _lines(value, depth + 1, notes, f"{path}{name}.")
        elif isinstance(value, list):
            yield f"{indent}{name}:  # {field.description}"
            for entry in value:
                first, *rest = _lines(entry, depth + 2, notes)
                yield f"{indent}  - {first.strip()}"
                yield from rest
        else:
            extra = field.json_schema_extra
            unit = f"{extra['unit']}; " if isinstance(extra, dict) and extra["unit"] != "–" else ""
            note = f". {notes[path + name]}" if path + name in notes else ""
            yield f"{indent}{name}: {_number(value)}  # {unit}{field.description}{note}"


def _number(value: float) -> str:
    """Return a number as YAML 1.1 reads it: `1.0e-06`, not `1e-06`, which it takes for text."""
    return yaml.safe_dump(float(f"{value:.4g}") if isinstance(value, float) else value).splitlines()[0]
