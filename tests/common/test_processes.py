"""A child ends with its parent."""

import os
import signal
import subprocess
import sys
import time

import pytest

CHILD = """
import signal, time
from common.processes import die_with_parent
die_with_parent({arguments})
{prepare}
print("ready", flush=True)
time.sleep(600)
"""
PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
print(child.pid, flush=True)
child.wait()
"""


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("arguments", "prepare"),
    [
        ("", "pass"),
        ("signal.SIGKILL", "signal.signal(signal.SIGTERM, signal.SIG_IGN)"),
    ],
)
def test_a_child_ends_with_a_killed_parent(arguments: str, prepare: str) -> None:
    child = CHILD.format(arguments=arguments, prepare=prepare)
    with subprocess.Popen([sys.executable, "-c", PARENT, child], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        lines = {parent.stdout.readline().strip(), parent.stdout.readline().strip()}
        (pid,) = (int(line) for line in lines - {"ready"})
        assert is_running(pid)
        parent.kill()
        deadline = time.monotonic() + 60
        while is_running(pid):
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_child_whose_parent_has_ended_before_ends_at_once() -> None:
    script = f"from common.processes import die_with_parent; die_with_parent(parent={os.getpid() + 1}); print('still here')"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout) == (-signal.SIGTERM, "")
