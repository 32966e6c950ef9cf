"""TCP ports for servers that a test starts."""

import random
import socket

_PORTS = range(20_000, 32_000)
"""Below the ephemeral ports: the kernel could give such a port to an outgoing connection while the server loads."""

_taken: list[socket.socket] = []
"""A socket with the name of each port that this process has returned. It keeps other test processes from the port until the
server listens there, which may take minutes; the kernel closes it when the process ends."""


def free_port() -> int:
    """Returns a port of 127.0.0.1 at which nothing listens, and which no test of any process gets from here again."""
    while True:
        port = random.choice(_PORTS)
        reservation = socket.socket(socket.AF_UNIX)
        try:
            reservation.bind(f"\0dvd-test-port-{port}")
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", port))
        except OSError:
            reservation.close()
            continue
        _taken.append(reservation)
        return port
