"""TCP ports for servers that a test starts."""

import random
import socket

_PORTS = range(20_000, 32_000)
"""Below the ephemeral ports: the kernel could give such a port to an outgoing connection while the server loads."""


def free_port() -> int:
    """Returns a port of 127.0.0.1 at which nothing listens."""
    while True:
        port = random.choice(_PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
