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
    if _has_ended(parent):  # before the kernel knew that we wanted a signal
        os.kill(os.getpid(), number)


def _has_ended(parent: int | None) -> bool:
    if parent is not None:
        return os.getppid() != parent
    # not by its process id: below a fork server of `multiprocessing`, the kernel has another parent
    process = multiprocessing.parent_process()
    return process is not None and not process.is_alive()
