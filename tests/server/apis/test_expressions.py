"""What regular expressions and grammars cost with their repetitions written out, and grammars without an end."""

import pytest

from server.apis.expressions import Cost, parse_grammar, regex_cost

REGEXES = {
    "": (0, 0, 0),
    "abc": (3, 0, 0),
    r"\{\d": (2, 0, 0),
    "a|bc": (3, 0, 0),
    "[a-z0-9]": (1, 0, 0),
    r"[\]a]x": (2, 0, 0),
    "[]a]x": (2, 0, 0),
    "[^]a]x": (2, 0, 0),
    "a{3}": (3, 0, 0),
    "a{3,5}": (5, 0, 0),
    "a{,5}": (5, 0, 0),
    "a{3,}": (3, 1, 0),
    "a{0}b": (2, 0, 0),
    "a{x}": (4, 0, 0),
    "(ab){10}": (20, 0, 1),
    "(?:ab){10}": (20, 0, 1),
    "((a{10}b){10}c){10}": (1110, 0, 2),
    "(a+)*": (1, 2, 1),
    "(a*){7}b?": (8, 7, 1),
    "(((": (0, 0, 3),
    "a)))b": (2, 0, 0),
    "(ab": (2, 0, 1),
    "a{99999999999999999999}": (10**9, 0, 0),
}


@pytest.mark.parametrize(("regex", "expected"), REGEXES.items(), ids=REGEXES)
def test_the_cost_of_a_regular_expression(regex: str, expected: tuple[int, int, int]) -> None:
    assert regex_cost(regex) == Cost(*expected)


GRAMMARS = {
    'root ::= "abc" [a-z]': (4, 0, 0),
    'root ::= ("ab" [0-9]){5} other*\nother ::= "\\"" # a comment {9}': (18, 1, 1),
    "start: (A | /b+/) ~ 3..4\nA: 'xyz'": (15, 0, 1),
}


@pytest.mark.parametrize(("grammar", "expected"), GRAMMARS.items(), ids=GRAMMARS)
def test_the_cost_of_a_grammar(grammar: str, expected: tuple[int, int, int]) -> None:
    assert parse_grammar(grammar).cost == Cost(*expected)


ENDLESS = {
    "root ::= root": "root",
    'root ::= "a" root': "root",
    'root ::= "a" root | root': "root",
    "root ::= a\na ::= b\nb ::= a": "root",
    'root ::= (root | root "b") "x"': "root",
    'root ::= "a" x{2,}\nx ::= x+': "root",
    'root ::= "a" | b\nb ::= b "x"': "b",
    "start: start": "start",
}


@pytest.mark.parametrize(("grammar", "rule"), ENDLESS.items(), ids=ENDLESS)
def test_a_rule_without_an_end_is_found(grammar: str, rule: str) -> None:
    assert parse_grammar(grammar).endless_rule() == rule


@pytest.mark.parametrize(
    "grammar",
    [
        "",
        "(",
        'root ::= root "a" | "b"',
        'root ::= "" | root root',
        'root ::= ("a" | root)',
        'root ::= ("a" root)?',
        'root ::= "x" root* "y"',
        'root ::= "x" root{0,3}',
        'root ::= "x" root{,3}',
        "root ::= undefined",
        'root ::=\n  | "a"',
        'root ::= "root ::= root"',
        'root ::= object\nobject ::= "{" (pair ("," pair)*)? "}"\npair ::= "\\"a\\"" ":" object',
        '?start: value\n?value: list\n | NAME\nlist: "[" [value ("," value)*] "]"\nNAME: /[a-z]+/\n%import common.WS',
    ],
)
def test_grammars_with_an_end_pass(grammar: str) -> None:
    assert parse_grammar(grammar).endless_rule() is None


def test_a_long_chain_of_rules_is_followed() -> None:
    chain = "\n".join([*(f"r{i} ::= r{i + 1} r{i + 1}" for i in range(500)), 'r500 ::= "a"'])
    assert parse_grammar(chain).endless_rule() is None
    assert parse_grammar(chain.replace('"a"', "r0")).endless_rule() == "r0"


@pytest.mark.parametrize(
    "text",
    ["a{" + " " * 8000 + "," + " " * 8000 + "x", "[" * 16_000, '"\\' * 8000, "'\\" * 8000, "/\\" * 8000, "~" + " " * 16_000],
    ids=["repetition", "brackets", "double quotes", "single quotes", "slashes", "tilde"],
)
def test_what_has_no_end_is_scanned_once(text: str) -> None:
    """Scanned from each of its characters, any of these would take from ten seconds to hours."""
    assert regex_cost(text).depth == parse_grammar(f"root ::= {text}").cost.depth == 0


def test_nested_repetitions_have_a_cost_that_can_be_printed() -> None:
    assert parse_grammar("root ::= a" + "{999999999}" * 1000).cost.size == 10**9
