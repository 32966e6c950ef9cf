"""A decoder that does what the tests of `common/decoder_processes.py` ask for."""

import ctypes
import os
import resource
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from io import BufferedWriter
from typing import Any

from common import errors
from common.decoder_child import serve


def _decode(arguments: dict[str, Any], data: bytes, output: BufferedWriter) -> dict[str, Any]:
    match arguments["action"]:
        case "copy":
            output.write(data)
            return {"size": len(data)}
        case "cut":
            output.write(data)
            output.flush()
            return {"error": _error(lambda: os.ftruncate(output.fileno(), 0))}
        case "too_large":
            raise errors.ImageTooLarge("too many pixels")
        case "unauthorized":
            raise errors.Unauthorized("pretends")
        case "spin":
            while True:
                pass
        case "work":
            end = time.process_time() + float(data)
            while time.process_time() < end:
                pass
        case "sleep":
            time.sleep(600)
        case "allocate":
            bytearray(100 << 20)
        case "write":
            output.write(bytes(40 << 20))
            output.write(bytes(40 << 20))
        case "exit":
            os._exit(1)
    return _inspect() if arguments["action"] == "inspect" else {}


def _inspect() -> dict[str, Any]:
    attempts: dict[str, Callable[[], Any]] = {
        "socket": socket.socket,
        "program": lambda: subprocess.run(["true"], check=False),
        "signal": lambda: os.kill(os.getppid(), signal.SIGCONT),
        "queued signal": lambda: _queue_signal(os.getppid(), signal.SIGCONT),
        "memory of its parent": lambda: os.close(os.open(f"/proc/{os.getppid()}/mem", os.O_RDONLY)),
    }
    folder = "/proc/self/fd"
    links = {name: os.readlink(f"{folder}/{name}") for name in os.listdir(folder) if os.path.lexists(f"{folder}/{name}")}
    return {
        "environment": dict(os.environ),
        "descriptors": links,
        "denied": [name for name, attempt in attempts.items() if _error(attempt) == "PermissionError"],
        "core_bytes": resource.getrlimit(resource.RLIMIT_CORE)[1],
    }


def _queue_signal(pid: int, number: int) -> None:
    """Send a signal as sigqueue(3) does. Raises: `OSError`."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.sigqueue(pid, number, None):
        raise OSError(ctypes.get_errno(), "sigqueue")


def _error(function: Callable[[], Any]) -> str:
    try:
        function()
    except Exception as error:
        return type(error).__name__
    return ""


if __name__ == "__main__":
    serve(_decode)
