"""The flags of the pinned `vllm serve`, known without importing vLLM, which takes ten seconds.

`vllm_flags.txt` has a flag a line, with a `+` after those that take several values. `python -m tests.lm_worker.vllm_flags >
lm_worker/vllm_flags.txt` writes it, and a test compares it with vLLM. Values are checked by vLLM alone.
"""

import difflib
import functools
import re
from collections.abc import Sequence, Set
from pathlib import Path

_FILE = Path(__file__).with_suffix(".txt")
_OPTIMIZATION_LEVEL = re.compile(r"-O=?\w*")


@functools.cache
def _several_by_flag() -> dict[str, bool]:
    """Return whether a flag takes several values, for every flag."""
    lines = _FILE.read_text(encoding="utf-8").splitlines()
    return {line.split()[0]: line.endswith(" +") for line in lines}


def known() -> Set[str]:
    """Return every flag, such as `--dtype`, `--no-enable-lora` or `-tp`."""
    return _several_by_flag().keys()


def takes_several(flag: str) -> bool:
    """Return whether a flag is followed by any number of words."""
    return _several_by_flag().get(flag, False)


def normalize(word: str) -> str:
    """Return a word's flag as vLLM's parser reads it: without value and key of a JSON object, `_` as `-`."""
    name = word.split("=")[0].split(".")[0]
    return name.replace("_", "-") if name.startswith("--") else name


def is_known(word: str) -> bool:
    """Return whether a word is a flag of vLLM. Like argparse, accepts the beginning of a flag if no other one begins so."""
    flag = normalize(word).removesuffix("+")
    if flag in known() or _OPTIMIZATION_LEVEL.fullmatch(word):
        return True
    return flag.startswith("--") and sum(name.startswith(flag) for name in known()) == 1


def first_unknown(words: Sequence[str]) -> str | None:
    """Return the first word that looks like a flag and is none, as it was given, without its value."""
    return next((word.split("=")[0] for word in words if _looks_like_a_flag(word) and not is_known(word)), None)


def nearest(flag: str) -> str | None:
    """Return the flag that was probably meant, or None."""
    return next(iter(difflib.get_close_matches(normalize(flag), known(), n=1, cutoff=0.75)), None)


def _looks_like_a_flag(word: str) -> bool:
    """Return what argparse does: a negative number, or a word with a space, is a value."""
    name = word.split("=")[0]
    return bool(re.match(r"--?[A-Za-z]", word)) and " " not in name
