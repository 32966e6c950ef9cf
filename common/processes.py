"""Ties the life of a child process to that of its parent."""

import ctypes
import multiprocessing
import os
import signal

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Make the kernel send SIGTERM to this process when its parent ends for any reason. Call it in the child."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:  # the parent ended while this process was still importing
        os.kill(os.getpid(), signal.SIGTERM)
