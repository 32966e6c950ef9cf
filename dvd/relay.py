"""Runs the program of one process and passes its output on, line by line.

Only a parent sees all that a worker prints: C++ libraries, and an interpreter that ends, do not use logging. It makes JSON of
what is none, and drops the noise of libraries. Signals are passed on, and the exit status is the program's.
"""

import contextlib
import functools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import NoReturn

from common import logs
from common.options import Options
from common.processes import die_with_parent
from dvd.output import print_child_line

_DRAIN_SECONDS = 10.0
"""Time for the last lines after the program has ended: descendants may still have its output open."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class _Signals:
    """Passes signals on to a process; those that arrive before it runs wait for it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._early: list[int] = []
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # ignored below nohup
                signal.signal(number, self._pass_on)

    def send_to(self, process: "subprocess.Popen[bytes]") -> None:
        """Pass signals on to this process from now on."""
        self._process = process
        for number in self._early:
            process.send_signal(number)

    def _pass_on(self, number: int, _frame: object) -> None:
        if self._process is None:
            self._early.append(number)
        else:
            self._process.send_signal(number)


def run(command: Sequence[str], options: Options) -> NoReturn:
    """Run a program in place of this process. Exits with its status, or by the signal that ended it."""
    signals = _Signals()
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        # a session of its own: Ctrl-C reaches it once, through this process. SIGKILL: even if it hangs
        start_new_session=True, preexec_fn=functools.partial(die_with_parent, signal.SIGKILL, os.getpid()),
    )  # fmt: skip
    signals.send_to(process)
    reader = threading.Thread(target=_print_lines, args=(process, options), daemon=True)
    reader.start()
    status = process.wait()
    reader.join(_DRAIN_SECONDS)
    with contextlib.suppress(OSError):
        if status < 0 and -status not in _SIGNALS:
            logs.print_line("dvd", f"the process was ended by {signal.Signals(-status).name}", options.log_format, "error")
        sys.stderr.flush()
    _exit_like(status)


def _print_lines(process: "subprocess.Popen[bytes]", options: Options) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        with contextlib.suppress(OSError):  # nobody reads our output: the program must not wait for that
            print_child_line("", line.decode(errors="replace").rstrip(), options)


def _exit_like(status: int) -> NoReturn:
    """Exit at once: a descendant of the program may keep the reader waiting, and with it an orderly end."""
    if status < 0:
        with contextlib.suppress(OSError):  # nobody can ignore SIGKILL
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)
