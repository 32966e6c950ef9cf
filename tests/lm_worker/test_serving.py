"""How a started language worker stops, with the real vLLM. `test_drain.py` tests the rules."""

import json
import signal
from concurrent.futures import ThreadPoolExecutor

from lm_worker.shared_memory import folder_of
from tests.e2e.serving import gone, mapped_shared_memory
from tests.lm_worker.workers import Worker, language_worker, wait_ready


def wait_until_running(worker: Worker, requests: int) -> None:
    worker.wait_until(lambda: worker.served.metric("vllm:num_requests_running") == requests)


def assert_nothing_is_left(worker: Worker) -> None:
    assert not folder_of(worker.listen).exists()
    assert gone(worker.served.mark, 30) == []


def test_a_worker_announces_its_end_and_serves_until_its_requests_have_ended() -> None:
    with language_worker("--shutdown-grace=600") as worker, ThreadPoolExecutor() as threads:
        wait_ready(worker)
        memory = mapped_shared_memory(worker.served.mark)
        assert memory
        assert not worker.describe().draining
        long = threads.submit(worker.served.chat, "Hello", max_tokens=1500, ignore_eos=True)
        wait_until_running(worker, 1)

        worker.signal(signal.SIGTERM)

        worker.wait_until(lambda: worker.describe().draining)
        assert worker.health() == 200
        assert worker.served.chat("Late", max_tokens=2).status == 200
        assert long.result().json["usage"]["completion_tokens"] == 1500
        assert worker.served.process.wait(60) == 0
        assert worker.lines.splitlines()[-1].endswith("SIGTERM: stopping after 1 requests in flight, within 600 s")
        assert_nothing_is_left(worker)
        assert [file for file in memory if file.exists()] == []


def test_a_second_signal_ends_requests_with_an_error() -> None:
    with language_worker("--shutdown-grace=600") as worker, ThreadPoolExecutor() as threads:
        wait_ready(worker)
        memory = mapped_shared_memory(worker.served.mark)
        parameters = {"max_tokens": 8000, "ignore_eos": True}
        whole = threads.submit(worker.served.chat, "Hello", **parameters)
        stream = threads.submit(worker.served.chat, "Hello", stream=True, **parameters)
        wait_until_running(worker, 2)

        worker.signal(signal.SIGINT)
        worker.wait_until(lambda: worker.describe().draining)
        assert worker.served.process.poll() is None
        worker.signal(signal.SIGINT)

        assert worker.served.process.wait(60) == 0
        assert whole.result().status == 503
        last = stream.result().text.split("data: ")[-2]
        assert json.loads(last)["error"]["code"] == 503
        assert "2 requests have not ended within the grace period: they get an error" in worker.lines.splitlines()[-1]
        assert_nothing_is_left(worker)
        assert [file for file in memory if file.exists()] == []
