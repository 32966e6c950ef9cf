"""How a child process is tied to the one that started it."""

import ctypes
import multiprocessing
import os
import signal

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Called in a child: the kernel ends it (SIGTERM) when its parent is gone, however that went."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:  # gone while this process was still importing
        os.kill(os.getpid(), signal.SIGTERM)
