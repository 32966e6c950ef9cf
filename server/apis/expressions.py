"""What regular expressions and grammars cost once their repetitions are written out, and grammars that no text matches.

They are scanned, not compiled: dialects differ, and what is invalid is left to vLLM.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

# Every quantifier is possessive, and what opens a text matches without its end too: else a few kilobytes of white space,
# of quotes or of brackets would take minutes.
_REPETITION = re.compile(r"\{\s*+(\d*+)\s*+(?:,\s*+(\d*+)\s*+)?+\}")
_MAX_DIGITS = 9
_MAX_COST = 10**_MAX_DIGITS
"""Sizes are not counted further: nested repetitions would make numbers of thousands of digits."""
_GROUP = re.compile(r"\((?:\?(?:[:=!>]|<[=!]|P?<\w+>))?")
_CHARACTER_CLASS = re.compile(r"\[\^?\]?(?:[^\]\\]|\\.)*+\]?", re.DOTALL)

_TOKENS = re.compile(
    r"""(?P<text>"(?:[^"\\\n]|\\.)*+"?|'(?:[^'\\\n]|\\.)*+'?|\[(?:[^\]\\]|\\.)*+\]?|/(?:[^/\\\n]|\\.)++(?:/[a-z]*+)?|\.)"""
    r"""|(?P<skip>\#[^\n]*+|//[^\n]*+|\s++)"""
    r"""|(?P<name>[A-Za-z_][\w-]*+(?:\.\d++)?)"""
    r"""|(?P<repetition>\{\s*+\d*+\s*+(?:,\s*+\d*+\s*+)?+\}|~\s*+\d++(?:\s*+\.\.\s*+\d++)?|[*+?])"""
    r"""|(?P<define>::=|:)"""
    r"""|(?P<other>.)""",
    re.DOTALL,
)


@dataclass(frozen=True)
class Cost:
    """Cost of a regular expression or a grammar.

    Attributes:
        size: Number of characters, classes and references, with repetitions written out.
        loops: Number of repetitions without an end, likewise. Where several of them can match the same characters, the time to
            compile them grows with a power of their number.
        depth: How deeply its groups are nested.
    """

    size: int
    loops: int
    depth: int


class _Sizes:
    """Sizes and loops of the groups that are open, the innermost last."""

    def __init__(self) -> None:
        self._groups = [((0, 0), (0, 0))]  # of each what there is so far, and its last element
        self.depth = 0

    def add(self, size: int, loops: int = 0) -> None:
        """Add an element."""
        (total_size, total_loops), (last_size, last_loops) = self._groups[-1]
        self._groups[-1] = (total_size + last_size, total_loops + last_loops), (size, loops)

    def open(self) -> None:
        """Open a group."""
        self._groups.append(((0, 0), (0, 0)))
        self.depth = max(self.depth, len(self._groups) - 1)

    def close(self) -> None:
        """Close the innermost group, which becomes an element of the one around it."""
        if len(self._groups) > 1:
            (size, loops), (last_size, last_loops) = self._groups.pop()
            self.add(size + last_size, loops + last_loops)

    def repeat(self, repetition: str) -> None:
        """Repeat the last element: `*`, `+`, `?`, `{m}`, `{m,}` or `{m,n}`."""
        total, (size, loops) = self._groups[-1]
        count = max(_largest(repetition), 1)
        is_loop = repetition in "*+" or re.search(r",\s*\}", repetition) is not None
        self._groups[-1] = total, (min(size * count, _MAX_COST), min(loops * count + is_loop, _MAX_COST))

    def cost(self) -> Cost:
        """Return the cost of everything."""
        while len(self._groups) > 1:
            self.close()
        total, last = self._groups[0]
        return Cost(total[0] + last[0], total[1] + last[1], self.depth)


def regex_cost(regex: str) -> Cost:
    """Return the cost of a regular expression."""
    sizes, position = _Sizes(), 0
    while position < len(regex):
        character, end = regex[position], position + 1
        if character == "\\":
            sizes.add(1)
            end += 1
        elif character == "[" and (match := _CHARACTER_CLASS.match(regex, position)):
            sizes.add(1)
            end = match.end()
        elif character == "(" and (match := _GROUP.match(regex, position)):
            sizes.open()
            end = match.end()
        elif character == ")":
            sizes.close()
        elif character == "{" and (match := _REPETITION.match(regex, position)):
            sizes.repeat(match[0])
            end = match.end()
        elif character in "*+?":
            sizes.repeat(character)
        elif character != "|":
            sizes.add(1)
        position = end
    return sizes.cost()


def _largest(repetition: str) -> int:
    """Return the largest number in a repetition; 0 if it has none."""
    numbers = re.findall(r"\d+", repetition)
    return max((int(digits) if len(digits) <= _MAX_DIGITS else 10**_MAX_DIGITS for digits in numbers), default=0)


@dataclass
class Grammar:
    """A grammar in EBNF as llama.cpp and xgrammar read it, or in Lark's form, as far as its budgets need it.

    Attributes:
        cost: Its cost.
        rules: Alternatives of each rule, each with the names that it needs; optional ones are left out.
    """

    cost: Cost
    rules: dict[str, list[set[str]]] = field(default_factory=dict)

    def endless_rule(self) -> str | None:
        """Return a rule of which every alternative leads back to itself, so that no text matches it; None if there is none."""
        users: dict[str, list[tuple[str, set[str]]]] = defaultdict(list)
        for name, alternatives in self.rules.items():
            for needs in alternatives:
                for needed in needs:
                    users[needed].append((name, needs))
        pending = [name for name, alternatives in self.rules.items() if any(not needs for needs in alternatives)]
        pending += [name for name in users if name not in self.rules]  # undefined: vLLM decides
        finite: set[str] = set()
        while pending:
            finished = pending.pop()
            if finished in finite:
                continue
            finite.add(finished)
            for name, needs in users[finished]:
                needs.discard(finished)
                if not needs:
                    pending.append(name)
        return next((name for name in self.rules if name not in finite), None)


def parse_grammar(text: str) -> Grammar:
    """Parse a grammar. What cannot be parsed counts as one element."""
    sizes, grammar = _Sizes(), Grammar(Cost(0, 0, 0))
    tokens = list(_tokens(text))
    alternatives: list[set[str]] = []
    groups: list[tuple[list[set[str]], set[str]]] = []  # around the current group: their alternatives, and the current one
    for i, (kind, value) in enumerate(tokens):
        following = tokens[i + 1] if i + 1 < len(tokens) else ("", "")
        if kind == "name" and following[0] == "define" and not groups:
            alternatives = grammar.rules.setdefault(value, [])
            alternatives.append(set())
        elif kind == "define" or not alternatives:
            continue
        elif kind == "repetition":
            sizes.repeat(value)
        elif value == "(":
            sizes.open()
            groups.append((alternatives, alternatives[-1]))
            alternatives = [set()]
        elif value == ")" and groups:
            sizes.close()
            inner = alternatives
            alternatives, current = groups.pop()
            if not _is_optional(following):
                _require_group(grammar, current, inner)
        elif value == "|":
            alternatives.append(set())
        else:
            sizes.add(max(len(value) - 2, 1) if kind == "text" and value[0] in "\"'/" else 1)
            if kind == "name" and not _is_optional(following):
                alternatives[-1].add(value)
    grammar.cost = sizes.cost()
    return grammar


def _require_group(grammar: Grammar, current: set[str], inner: list[set[str]]) -> None:
    """Make an alternative need one of a group's: as a rule of its own if there are several."""
    if len(inner) == 1:
        current |= inner[0]
        return
    name = f"({len(grammar.rules)}"  # no caller's name has a parenthesis
    grammar.rules[name] = inner
    current.add(name)


def _is_optional(following: tuple[str, str]) -> bool:
    """Return whether an element may be absent, by the token that follows it."""
    kind, value = following
    if kind != "repetition" or value == "+":
        return False
    least = re.search(r"\d+|,", value)
    return least is None or least[0].strip("0,") == ""


def _tokens(text: str) -> Iterator[tuple[str, str]]:
    for match in _TOKENS.finditer(text):
        if match.lastgroup != "skip":
            yield str(match.lastgroup), match[0]
