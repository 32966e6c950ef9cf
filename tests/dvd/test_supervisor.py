"""The supervisor of `dvd up`, with small scripts for processes. tests/e2e/test_up.py runs the real ones."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.options import Options
from dvd.supervisor import Supervisor
from dvd.up_processes import ProcessSpec

TEXT, JSON = Options(), Options(log_format="json")

FOREVER = "import time; print('started', flush=True); time.sleep(600)"
STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {FOREVER}"


def spec(name: str, script: str, stop_timeout: float = 20.0, **environment: str) -> ProcessSpec:
    async def is_ready() -> bool:
        return True

    return ProcessSpec(name, ["-c", script], is_ready, environment, stop_timeout=stop_timeout)


def record_pid(file: Path, script: str) -> str:
    return f"import os; open({str(file)!r}, 'w').write(str(os.getpid())); {script}"


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def until_output(capfd: pytest.CaptureFixture[str], *texts: str) -> str:
    output = ""
    async with asyncio.timeout(30):
        while not all(text in output for text in texts):
            await asyncio.sleep(0.02)
            output += capfd.readouterr().err
    return output


async def test_a_process_that_ends_is_named_and_the_others_are_stopped(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    wait_for_file = f"import os, sys, time\nwhile not os.path.exists({str(pid_file)!r}): time.sleep(0.02)\nsys.exit(3)"
    specs = [spec("vision-0", record_pid(pid_file, FOREVER)), spec("gateway", wait_for_file)]
    async with Supervisor(specs, TEXT) as supervisor:
        assert await supervisor.wait() == "gateway ended with 3; see its last lines above"
    assert not is_running(int(pid_file.read_text()))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
async def test_a_signal_is_no_failure(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    async with Supervisor([spec("vision-0", FOREVER)], TEXT) as supervisor:
        waiting = asyncio.create_task(supervisor.wait())
        await until_output(capfd, "vision-0 | started")
        os.kill(os.getpid(), number)
        assert await waiting is None


async def test_a_process_that_ignores_sigterm_is_killed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pid_file = tmp_path / "pid"
    async with Supervisor([spec("vision-0", record_pid(pid_file, STUBBORN), stop_timeout=0.2)], TEXT):
        await until_output(capfd, "vision-0 | started")
    async with asyncio.timeout(30):  # the event loop reaps it a moment later
        while is_running(int(pid_file.read_text())):
            await asyncio.sleep(0.02)


async def test_the_gateway_stops_first_and_a_second_signal_is_passed_on(capfd: pytest.CaptureFixture[str]) -> None:
    gateway, worker = (
        f"""
import signal, sys, time
count = 0
def stop(number, frame):
    global count
    count += 1
    print("{name}: signal", count, flush=True)
    if count == {last}:
        sys.exit()
signal.signal(signal.SIGTERM, stop)
{FOREVER}
"""
        for name, last in (("gateway", 2), ("worker", 2))
    )
    specs = [spec("vision-0", worker, stop_timeout=600), spec("gateway", gateway, stop_timeout=600)]
    started = asyncio.Event()

    async def run() -> None:
        async with Supervisor(specs, TEXT) as supervisor:
            started.set()
            assert await supervisor.wait() is None

    running = asyncio.create_task(run())
    await started.wait()
    await until_output(capfd, "vision-0 | started", "gateway | started")
    os.kill(os.getpid(), signal.SIGTERM)
    output = await until_output(capfd, "gateway: signal 1")
    assert "worker: signal" not in output, "the gateway still serves"
    assert not running.done()
    os.kill(os.getpid(), signal.SIGTERM)
    output = await until_output(capfd, "gateway: signal 2", "worker: signal 2")
    await asyncio.wait_for(running, 30)


async def test_a_process_has_its_grace_period_before_it_is_killed(capfd: pytest.CaptureFixture[str]) -> None:
    finish = "lambda *_: (time.sleep(1), print('finished'), sys.exit())"
    script = f"import signal, sys, time; signal.signal(signal.SIGTERM, {finish})\n{FOREVER}"
    async with Supervisor([spec("vision-0", script, stop_timeout=600)], TEXT):
        await until_output(capfd, "vision-0 | started")
    assert "vision-0 | finished" in capfd.readouterr().err


async def test_the_end_of_a_process_is_seen_although_a_descendant_keeps_its_output_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dvd.supervisor._LAST_LINES_SECONDS", 0.2)
    pid_file = tmp_path / "pid"
    child = record_pid(pid_file, "import time; time.sleep(600)")
    wait_for_file = f"import os, time\nwhile not os.path.exists({str(pid_file)!r}): time.sleep(0.02)"
    start_child = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}])"
    script = f"{start_child}\n{wait_for_file}\nprint('last line'); sys.exit(3)"
    async with asyncio.timeout(60):
        async with Supervisor([spec("language-0", script)], TEXT) as supervisor:
            assert await supervisor.wait() == "language-0 ended with 3; see its last lines above"
    assert "language-0 | last line" in capfd.readouterr().err
    async with asyncio.timeout(30):
        while is_running(int(pid_file.read_text())):
            await asyncio.sleep(0.02)


SUPERVISOR = """
import asyncio, sys
from common.options import Options
from tests.dvd.test_supervisor import spec, Supervisor

async def main():
    async with Supervisor([spec("vision-0", sys.argv[1])], Options()) as supervisor:
        await supervisor.wait()

asyncio.run(main())
"""


@pytest.mark.parametrize("script", [FOREVER, f"import os, signal; os.kill(os.getpid(), signal.SIGSTOP); {FOREVER}"])
def test_a_process_ends_with_a_killed_supervisor_also_if_it_is_stopped(tmp_path: Path, script: str) -> None:
    pid_file = tmp_path / "pid"
    supervisor = subprocess.Popen([sys.executable, "-c", SUPERVISOR, record_pid(pid_file, script)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (pid_file.exists() and pid_file.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    supervisor.kill()
    supervisor.wait()
    while is_running(int(pid_file.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.02)


async def test_a_program_that_cannot_start_stops_those_that_did(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    missing = ProcessSpec("gateway", [], spec("", "").is_ready, program=str(tmp_path / "missing"))
    with pytest.raises(FileNotFoundError):
        async with Supervisor([spec("vision-0", record_pid(pid_file, FOREVER)), missing], TEXT):
            pass
    assert not pid_file.exists() or not is_running(int(pid_file.read_text()))


async def test_dvd_variables_are_not_inherited(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVD_PORT", "1")
    script = "import os; print(*sorted(k for k in os.environ if k.startswith('DVD_')), flush=True)"
    async with Supervisor([spec("gateway", script, DVD_API_KEY="secret")], JSON) as supervisor:
        await supervisor.wait()
    output = capfd.readouterr().err
    assert '"message": "DVD_API_KEY"' in output
    assert '"message": "gateway: starting"' in output


async def test_the_noise_of_libraries_is_dropped_and_the_rest_is_json(capfd: pytest.CaptureFixture[str]) -> None:
    script = "print('nanobind: leaked 4 instances!'); print('two'); print('{\"a\": 1}')"
    async with Supervisor([spec("language-0", script)], JSON) as supervisor:
        await supervisor.wait()
    lines = capfd.readouterr().err.splitlines()
    # gRPC, which earlier tests use in this process, may write a line of its own when it forks
    records = [json.loads(line) for line in lines if "fork_posix" not in line]
    assert [record.get("message") for record in records] == ["language-0: starting", "two", None]
