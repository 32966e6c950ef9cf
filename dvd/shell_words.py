"""Runs a command with words from one text: `python -m dvd.shell_words PROGRAM [WORD …] TEXT`, for the Makefile's ARGS.

The text is split as a shell splits it, except that JSON needs no quotes around it: `--override-generation-config {"a": 1}` are
two words. A shell would remove the quotes inside, and split at the space.
"""

import json
import os
import re
import shlex
import sys

_JSON_AT_START_OF_VALUE = re.compile(r"(?<![^\s=])[{\[]")
_QUOTED_OR_OTHER = re.compile(r"""'[^']*'|"(?:\\.|[^"\\])*"|\\.|.""", re.DOTALL)


def split(text: str) -> list[str]:
    """Return the words of a text. Raises: `ValueError` where a quote is not closed."""
    quoted, position = "", 0
    while position < len(text):
        end = _end_of_json(text, position)
        if end:
            quoted += shlex.quote(text[position:end])
        else:
            match = _QUOTED_OR_OTHER.match(text, position)
            end = match.end() if match else len(text)
            quoted += text[position:end]
        position = end
    return shlex.split(quoted)


def _end_of_json(text: str, position: int) -> int | None:
    """Return where an object or list ends that begins here as the value of a flag, or None."""
    if not _JSON_AT_START_OF_VALUE.match(text, position):
        return None
    try:
        return json.JSONDecoder().raw_decode(text, position)[1]
    except ValueError:
        return None


def main() -> None:
    """Run the program in place of this process. Exits 2 with one line if the text cannot be split."""
    *command, text = sys.argv[1:]
    try:
        words = split(text)
    except ValueError as error:
        print(f"ARGS={text}: {str(error).lower()}", file=sys.stderr)
        sys.exit(2)
    os.execv(command[0], [*command, *words])


if __name__ == "__main__":
    main()
