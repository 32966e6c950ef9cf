"""Ties the life of a child process to that of its parent."""

import ctypes
import multiprocessing
import os
import signal

_PR_SET_PDEATHSIG = 1


def die_with_parent(number: signal.Signals = signal.SIGTERM, parent: int | None = None) -> None:
    """Make the kernel send a signal to this process when its parent ends for any reason. Call it in the child.

    For the kernel, the parent is the thread that forked this process: fork from one that lives as long as its process.

    Args:
        number: The signal. SIGKILL also ends a child that is stopped or hangs, and with it an orderly end.
        parent: Process id of the parent; None: that of `multiprocessing`, if this is one of its processes.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if parent is None and (process := multiprocessing.parent_process()) is not None:
        parent = process.pid
    if parent is not None and os.getppid() != parent:  # the parent ended before the kernel knew of our wish
        os.kill(os.getpid(), number)
