"""Language workers as processes, for tests."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import grpc

from protos import embeddings_pb2 as pb
from protos import embeddings_pb2_grpc
from tests.e2e.serving import GOLDEN, QUICK, START_TIMEOUT, Served, pid_of, request, start, stop
from tests.ports import free_port


@dataclass
class Worker:
    """A language worker without a gateway."""

    served: Served
    listen: str

    @property
    def lines(self) -> str:
        """What it has printed so far."""
        return self.served.lines

    @property
    def core(self) -> int:
        """Process id of its engine core."""
        return pid_of(self.served.mark, "EngineCore")

    @property
    def main(self) -> int:
        """Process id of the worker itself, without the process that passes its output on."""
        return pid_of(self.served.mark, "-m\0lm_worker\0")

    def describe(self) -> pb.LanguageDescription:
        """Return what its sink reports."""
        with grpc.insecure_channel(self.listen) as channel:
            description: pb.LanguageDescription = embeddings_pb2_grpc.EmbeddingSinkStub(channel).Describe(
                pb.DescribeRequest(), timeout=60
            )
            return description

    def health(self) -> int:
        """Return the status of vLLM's `/health`."""
        return request(f"{self.served.url}/health", timeout=60).status

    def signal(self, number: signal.Signals) -> None:
        """Send a signal as a supervisor does."""
        self.served.process.send_signal(number)

    def wait_until(self, condition: Callable[[], bool], seconds: float = START_TIMEOUT) -> None:
        """Wait until a condition holds, while the worker runs."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.served.process.poll() is None, self.lines
            assert time.monotonic() < deadline, self.lines
            time.sleep(0.05)


@contextlib.contextmanager
def language_worker(*flags: str) -> Iterator[Worker]:
    """Run a language worker and yield it at once; it is not ready yet."""
    listen, http = (f"127.0.0.1:{free_port()}" for _ in range(2))
    checkpoint = GOLDEN / "flash-qwen3/checkpoint"
    addresses = (f"--listen={listen}", f"--http={http}")
    worker = Worker(start("language", checkpoint, *addresses, *flags, "--", *QUICK, url=f"http://{http}"), listen)
    try:
        yield worker
    finally:
        with contextlib.suppress(ValueError, ProcessLookupError):
            os.kill(worker.core, signal.SIGCONT)
        stop(worker.served)


def wait_ready(worker: Worker) -> None:
    """Wait until a worker serves."""
    worker.wait_until(lambda: "dvd.language: ready on" in worker.lines)
