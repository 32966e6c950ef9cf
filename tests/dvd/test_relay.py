"""A program below the relay: its lines, its exit status, and signals."""

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

RELAY = """
import sys
from common.options import Options
from dvd import relay
relay.run([sys.executable, "-u", "-c", sys.argv[1]], Options(log_level=sys.argv[2], log_format=sys.argv[3]))
"""


def start(script: str, log_level: str = "info", log_format: str = "text") -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", RELAY, script, log_level, log_format]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(script: str, *options: str) -> tuple[int, list[str]]:
    process = start(script, *options)
    output, lines = process.communicate(timeout=60)
    assert output == ""
    return process.returncode, lines.splitlines()


PRINTING = "import sys; print('on stdout'); print('nanobind: leaked 4 instances!', file=sys.stderr); print('last', end='')"


def test_lines_are_passed_on_without_noise() -> None:
    assert run(PRINTING) == (0, ["on stdout", "last"])
    assert len(run(PRINTING, "debug")[1]) == 3


def test_every_line_becomes_json() -> None:
    _, lines = run("import os; os.write(2, b'\\xff from C++\\n'); 1 / 0", "info", "json")
    messages = [json.loads(line)["message"] for line in lines]
    assert (messages[0], messages[-1]) == ("\ufffd from C++", "ZeroDivisionError: division by zero")


@pytest.mark.parametrize("status", [0, 1, 2])
def test_the_exit_status_is_that_of_the_program(status: int) -> None:
    assert run(f"raise SystemExit({status})") == (status, [])


def test_a_signal_that_ends_the_program_ends_the_relay() -> None:
    ending = "import os, signal; os.kill(os.getpid(), signal.{})"
    assert run(ending.format("SIGKILL")) == (-signal.SIGKILL, ["dvd: the process was ended by SIGKILL"])
    assert run(ending.format("SIGTERM")) == (-signal.SIGTERM, [])


@pytest.fixture
def waiting() -> Iterator["subprocess.Popen[str]"]:
    process = start(
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('stopping'), sys.exit(3)))\n"
        "print(os.getpid())\ntime.sleep(600)"
    )
    yield process
    process.kill()
    process.communicate()


def test_a_signal_reaches_the_program_which_may_end_in_its_own_way(waiting: "subprocess.Popen[str]") -> None:
    assert waiting.stderr is not None
    waiting.stderr.readline()
    waiting.terminate()
    assert waiting.wait(60) == 3
    assert waiting.stderr.read() == "stopping\n"


def test_the_program_ends_with_the_relay(waiting: "subprocess.Popen[str]") -> None:
    assert waiting.stderr is not None
    pid = int(waiting.stderr.readline())
    descriptor = os.pidfd_open(pid)
    waiting.kill()
    assert select.select([descriptor], [], [], 60)[0], "SIGTERM of the kernel has ended it"
    os.close(descriptor)


def test_a_program_goes_on_when_nobody_reads_its_output() -> None:
    process = start("import sys\nfor _ in range(20000): print('x' * 80)\nsys.exit(5)")
    assert process.stderr is not None
    process.stderr.close()
    assert process.wait(60) == 5
    assert process.stdout is not None
    process.stdout.close()
