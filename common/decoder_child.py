"""The decoder process: serves the calls of `common/decoder_processes.py`, one after the other, on the socket that is its stdin.

A module that decodes runs as `python -m MODULE` and ends with `serve(decode)`. It should import little: its process is started
again whenever a file exceeds its limits.
"""

import contextlib
import json
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from io import BufferedWriter
from typing import Any

from common.errors import DvdError
from common.processes import die_with_parent
from common.sandbox import confine

MAX_MESSAGE_BYTES = 1 << 16
READY = b"ready"
OUT_OF_MEMORY = "out_of_memory"
_OOM_SCORE = "1000"

Decode = Callable[[dict[str, Any], bytes, BufferedWriter], dict[str, Any]]
"""Decodes a file: (arguments, file, output) to a result in JSON. Pixels are written to the output."""


def serve(decode: Decode) -> None:
    """Serve calls until the parent closes the socket, or until one needs more memory than is allowed."""
    parent, memory_bytes = map(int, sys.argv[1:])
    die_with_parent(signal.SIGKILL, parent)
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to every process of a group: the parent may have calls to finish
        signal.signal(number, signal.SIG_IGN)
    _limit_resources(memory_bytes)
    confine()
    with socket.socket(fileno=0) as connection:
        connection.send(READY)
        while True:
            message, files, _, _ = socket.recv_fds(connection, MAX_MESSAGE_BYTES, 2)
            if not message:
                return
            reply = _decode(decode, json.loads(message), *files)
            connection.send(json.dumps(reply).encode())
            if reply.get("error") == OUT_OF_MEMORY:  # libraries may not have recovered from it
                return


def _decode(decode: Decode, call: dict[str, Any], input_file: int, output_file: int) -> dict[str, Any]:
    # when so much CPU time has passed, SIGPROF ends this process, whatever a decoder does
    signal.setitimer(signal.ITIMER_PROF, call["cpu_seconds"])
    try:
        with open(input_file, "rb") as file, open(output_file, "wb") as output:
            result = decode(call["arguments"], file.read(), output)
            output.flush()
            return {"result": result, "written": os.lseek(output_file, 0, os.SEEK_CUR)}
    except DvdError as error:
        return {"error": error.code, "message": str(error)}
    except (MemoryError, OSError):  # OSError: the output is full; decoders turn those of their own into `DvdError`
        return {"error": OUT_OF_MEMORY}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _limit_resources(memory_bytes: int) -> None:
    """Limit private memory to what is used now and `memory_bytes` more, and every file to `memory_bytes`.

    Where the system has a smaller limit already, that one stays.
    """
    with open("/proc/self/status") as status:
        used = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmData:"))
    limits = {resource.RLIMIT_DATA: used + memory_bytes, resource.RLIMIT_FSIZE: memory_bytes, resource.RLIMIT_CORE: 0}
    for kind, limit in limits.items():
        most = resource.getrlimit(kind)[1]
        least = limit if most == resource.RLIM_INFINITY else min(limit, most)
        resource.setrlimit(kind, (least, least))
    # where memory runs out, this process ends first; not every container may write there
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write(_OOM_SCORE)
