"""CPU time and state of real processes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from lm_worker.engine_processes import ProcessTree

PARENT = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"


@pytest.fixture
def parent() -> Iterator["subprocess.Popen[bytes]"]:
    """A process that waits for its child, which waits for standard input."""
    process = subprocess.Popen([sys.executable, "-c", PARENT], stdin=subprocess.PIPE)
    yield process
    process.communicate(b"\n", 60)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def child_of(parent: "subprocess.Popen[bytes]", tree: ProcessTree) -> int:
    until(lambda: len(tree.read(find_descendants=True)) == 2)
    (child,) = tree.read(find_descendants=False).keys() - {parent.pid}
    return child


def test_descendants_are_found(parent: "subprocess.Popen[bytes]") -> None:
    tree = ProcessTree([parent.pid])
    child = child_of(parent, tree)
    assert tree.read(find_descendants=True)[child].parent == parent.pid


def test_a_stopped_descendant_is_seen(parent: "subprocess.Popen[bytes]") -> None:
    tree = ProcessTree([parent.pid])
    child = child_of(parent, tree)
    assert not tree.read(find_descendants=False)[child].is_stopped
    os.kill(child, signal.SIGSTOP)
    until(lambda: tree.read(find_descendants=False)[child].is_stopped)
    os.kill(child, signal.SIGCONT)
    until(lambda: not tree.read(find_descendants=False)[child].is_stopped)


def test_computing_uses_cpu_time() -> None:
    tree, pid = ProcessTree([os.getpid()]), os.getpid()
    before = tree.read(find_descendants=False)[pid].cpu_ticks
    until(lambda: sum(range(100_000)) > 0 and tree.read(find_descendants=False)[pid].cpu_ticks > before)


def test_a_process_that_computes_is_runnable_and_one_that_waits_for_input_is_not(parent: "subprocess.Popen[bytes]") -> None:
    tree = ProcessTree([parent.pid])
    child = child_of(parent, tree)
    until(lambda: not tree.read(find_descendants=False)[child].is_runnable)
    computing = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        tree = ProcessTree([computing.pid])
        until(lambda: all(tree.read(find_descendants=False)[computing.pid].is_runnable for _ in range(20)))
    finally:
        computing.kill()
        computing.wait()


def test_an_ended_process_is_left_out_also_before_its_parent_has_read_its_status() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    tree = ProcessTree([process.pid])
    until(lambda: not tree.read(find_descendants=False))
    process.wait()
    assert not tree.read(find_descendants=True)
