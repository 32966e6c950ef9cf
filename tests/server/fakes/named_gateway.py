"""`python -m tests.server.fakes.named_gateway FLAGS`: a gateway that resolves names by a file, which a test may rewrite.

The file, whose path is in an environment variable, maps each name to its hosts, as JSON. With `--workers` each process imports
this module, so that all of them resolve names alike.
"""

import json
import os
import socket
from pathlib import Path

from server.workers import discovery

NAMES_VARIABLE = "SOAK_NAMES"


def _hosts(name: str) -> list[str]:
    return list(json.loads(Path(os.environ[NAMES_VARIABLE]).read_text()).get(name, []))


async def _resolve(name: str, port: int) -> list[str]:
    hosts = _hosts(name)
    if not hosts:
        raise socket.gaierror(socket.EAI_NONAME, "no such name")
    return [f"{host}:{port}" for host in hosts]


if NAMES_VARIABLE in os.environ:  # not in a test that imports this module for the variable's name
    discovery.resolve = _resolve  # before the module that has it as a default is imported

from server.__main__ import main  # noqa: E402

if __name__ == "__main__":
    main()
