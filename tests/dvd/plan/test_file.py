"""The file of `dvd plan`: the example, what it is written as, and the message about a bad one."""

import pytest
import yaml

from dvd.plan.file import EXAMPLE_COSTS, EXAMPLE_LOAD, PlanFile, example, read, render
from dvd.plan.model import Costs, Load

NONE: dict[str, dict[str, float]] = {"load": {}, "limits": {}}
VISION, LANGUAGE = "vision: {prepare: 1, tile: 1}", "language: {prefill: 1}"


def test_the_example_is_valid_and_comments_every_key() -> None:
    text = example()
    assert read(text, NONE) == PlanFile(costs=EXAMPLE_COSTS, load=EXAMPLE_LOAD)
    for line in text.splitlines():
        is_part = line.strip() in ("costs:", "vision:", "language:", "load:", "limits:")
        assert is_part or "# " in line, line


def test_what_is_written_is_read_to_four_digits() -> None:
    costs = EXAMPLE_COSTS.model_copy(update={"language": EXAMPLE_COSTS.language.model_copy(update={"attention": 1.23456e-11})})
    text = render(costs, Load(), ("header",), {"vision.cores": "a note"})
    assert text.startswith("# header\n")
    assert "cores that prepare images. a note\n" in text
    content = read(text, NONE)
    assert content.costs.language.attention == 1.235e-11
    assert content.load == Load()


def test_overrides_replace_values_of_the_file() -> None:
    content = read(example(), {"load": {"rate": 3.0}, "limits": {"itl": 0.5}})
    assert (content.load.rate, content.load.limits.itl, content.load.limits.ttft) == (3.0, 0.5, EXAMPLE_LOAD.limits.ttft)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a mapping with the keys costs and load; dvd plan --example prints one"),
        ("[1, 2]", "expected a mapping with the keys costs and load; dvd plan --example prints one"),
        ("a: [", "line 1, column 5: expected the node content, but found '<stream end>'"),
        ("cost: {}", "cost: unknown key; did you mean costs?"),
        ("costs: {}", "costs.vision = missing: expected a value"),
        ("load: {}", "costs = missing: expected a value"),
        ("costs: 5", "costs = 5: expected a mapping of keys"),
        ("costs: {vision: {prepare: 1}}",
         "costs.vision.tile = missing: expected a value (seconds; per tile of a batch: tower, router and projector)"),
        (f"costs: {{{VISION}, {LANGUAGE}, bytes_per_token: 0}}",
         "costs.bytes_per_token = 0: expected at least 1 (bytes; of an embedding: width × 2 in bfloat16)"),
        (f"costs: {{{VISION}, language: {{prefill: fast}}, bytes_per_token: 1}}",
         "costs.language.prefill = 'fast': expected a number (seconds; per token of prefill)"),
        (f"costs: {{{VISION}, language: {{prefill: -2}}, bytes_per_token: 1}}",
         "costs.language.prefill = -2: expected more than 0 (seconds; per token of prefill)"),
        (f"costs: {{vision: {{prepare: 1, tile: 1, tiles: 3}}, {LANGUAGE}, bytes_per_token: 1}}",
         "costs.vision.tiles: unknown key; did you mean tile?"),
        (f"costs: {{{VISION}, {LANGUAGE}, bytes_per_token: 1, zzz: 3}}",
         "costs.zzz: unknown key; expected vision, language, tokens_per_tile, compressed_tokens_per_tile, bytes_per_token"),
        *((f"costs: {{{VISION}, {LANGUAGE}, bytes_per_token: 1}}\nload: {load}", message) for load, message in (
            ("7", "load = 7: expected a mapping of keys"),
            ("{limits: 7}", "load.limits = 7: expected a mapping of keys"),
            ("{rate: .inf}", "load.rate = inf: expected a finite number (requests/s; arriving at random)"),
            ("{rate: .nan}", "load.rate = nan: expected a finite number (requests/s; arriving at random)"),
            ("{compressed: 2}", "load.compressed = 2: expected at most 1 (0 to 1; share of tiles that the router compresses)"),
            ("{kinds: []}", "load.kinds = []: expected at least 1 entry"),
            ("{kinds: {images: 1}}", "load.kinds = {'images': 1}: expected a list"),
            ("{kinds: [{}, {images: 1.5}]}", "load.kinds.1.images = 1.5: expected a whole number (images; in a request)"),
            ("{kinds: [{output: 1000000000}]}",
             "load.kinds.0.output = 1000000000: expected at most 100000 (tokens; of the answer)"),
            ("{kinds: [{imags: 1}]}", "load.kinds.0.imags: unknown key; did you mean images?"),
        )),
    ],
)  # fmt: skip
def test_a_bad_file_is_one_line_with_key_value_and_expectation(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        read(text, NONE)
    assert str(caught.value) == message


def test_numbers_without_a_point_are_numbers() -> None:
    """YAML 1.1 takes 1e-6 for text."""
    assert yaml.safe_load("1e-6") == "1e-6"
    text = f"costs: {{vision: {{prepare: 1e-6, tile: 1}}, {LANGUAGE}, bytes_per_token: 1}}"
    assert Costs.model_validate(read(text, NONE).costs).vision.prepare == 1e-6
