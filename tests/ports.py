"""TCP ports for servers that a test starts."""

import random
import socket

_BELOW_EPHEMERAL = range(20_000, 32_000)
"""A port that the kernel gives to outgoing connections may be one's own until a server is up that has to load first."""


def free_port() -> int:
    """One of 127.0.0.1 that nobody listened at a moment ago."""
    while True:
        port = random.choice(_BELOW_EPHEMERAL)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
