"""A worker's state: changed by its own methods only."""

import ast
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from common import errors
from protos import vision_pb2
from server.workers.clients import VisionClient
from server.workers.worker import VisionWorker

SERVER = Path(__file__).parents[3] / "server"
DESCRIPTION = vision_pb2.VisionDescription(device="cpu")
LATE = errors.DeadlineExceeded("late")


@pytest.fixture
async def worker() -> AsyncIterator[VisionWorker]:
    async with VisionClient("unix:/nowhere") as client:
        yield VisionWorker(client)


async def test_a_worker_is_up_from_its_first_successful_probe_until_it_is_marked_down(worker: VisionWorker) -> None:
    assert not worker.is_up
    worker.mark_up(DESCRIPTION)
    assert worker.is_up
    assert worker.description == DESCRIPTION
    worker.mark_down("gone")
    assert not worker.is_up
    assert worker.description is None


async def test_one_late_probe_is_tolerated_and_two_are_not(worker: VisionWorker) -> None:
    worker.mark_up(DESCRIPTION)
    worker.record_failed_probe(LATE)
    assert worker.is_up
    worker.mark_up(DESCRIPTION)
    worker.record_failed_probe(LATE)
    assert worker.is_up, "a successful probe in between resets the count"
    worker.record_failed_probe(LATE)
    assert not worker.is_up


async def test_a_refused_connection_marks_the_worker_down_at_once(worker: VisionWorker) -> None:
    worker.mark_up(DESCRIPTION)
    worker.record_failed_probe(errors.WorkerUnavailable("connection refused"))
    assert not worker.is_up


async def test_only_the_transition_to_down_is_logged(worker: VisionWorker, caplog: pytest.LogCaptureFixture) -> None:
    worker.mark_up(DESCRIPTION)
    for _ in range(3):
        worker.mark_down("it does not answer")
    (record,) = caplog.records
    assert record.getMessage() == "vision worker unix:/nowhere is down: it does not answer"


async def test_only_calls_that_cannot_reach_the_worker_mark_it_down(worker: VisionWorker) -> None:
    worker.mark_up(DESCRIPTION)
    with pytest.raises(errors.SinkFull), worker.marking_down_if_gone():
        raise errors.SinkFull("no room")
    assert worker.is_up
    with pytest.raises(errors.WorkerUnavailable), worker.marking_down_if_gone():
        raise errors.WorkerUnavailable("gone")
    assert not worker.is_up


async def test_requests_in_flight_keep_the_client_in_use(worker: VisionWorker) -> None:
    with worker.in_use():
        assert (worker.is_in_use, worker.outstanding) == (True, 0)
        with worker.track_in_flight():
            assert (worker.is_in_use, worker.outstanding) == (True, 1)
    assert (worker.is_in_use, worker.outstanding) == (False, 0)


def test_no_other_file_assigns_the_state_of_a_worker() -> None:
    state = {"_description", "_late_probes", "_outstanding", "_users", "_models", "_load"}
    for file in SERVER.rglob("*.py"):
        if file.name == "worker.py":
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AugAssign) else []
            for target in targets:
                if isinstance(target, ast.Attribute) and target.attr in state:
                    assert isinstance(target.value, ast.Name), f"{file}:{target.lineno}"
                    assert target.value.id == "self", f"{file}:{target.lineno}"
