"""Where vLLM's HTTP server is reached."""

import pytest

from common.addresses import is_unreachable_loopback, vllm_address


@pytest.mark.parametrize(
    ("http", "sink", "expected"),
    [
        ("unix:/run/vllm", "unix:/run/sink", "unix:/run/vllm"),
        ("0.0.0.0:8001", "10.0.0.5:50052", "10.0.0.5:8001"),
        ("0.0.0.0:8001", "language-0.example:50052", "language-0.example:8001"),
        (":8001", "10.0.0.5:50052", "10.0.0.5:8001"),
        ("[::]:8001", "[fd00::5]:50052", "[fd00::5]:8001"),
        ("0.0.0.0:8001", "unix:/run/sink", "127.0.0.1:8001"),
        ("10.0.0.6:8001", "10.0.0.5:50052", "10.0.0.6:8001"),
        ("vllm.example:8001", "10.0.0.5:50052", "vllm.example:8001"),
        ("127.0.0.1:8001", "10.0.0.5:50052", "127.0.0.1:8001"),
    ],
)
def test_vllm_is_on_the_sinks_host_if_it_listens_on_every_address(http: str, sink: str, expected: str) -> None:
    assert vllm_address(http, sink) == expected


@pytest.mark.parametrize(
    ("http", "sink", "expected"),
    [
        ("127.0.0.1:8001", "10.0.0.5:50052", True),
        ("localhost:8001", "language-0.example:50052", True),
        ("[::1]:8001", "[fd00::5]:50052", True),
        ("127.0.0.1:8001", "127.0.0.1:50052", False),
        ("127.0.0.1:8001", "localhost:50052", False),
        ("127.0.0.1:8001", "unix:/run/sink", False),
        ("0.0.0.0:8001", "10.0.0.5:50052", False),
        ("vllm.example:8001", "10.0.0.5:50052", False),
        ("unix:/run/vllm", "10.0.0.5:50052", False),
    ],
)
def test_loopback_is_unreachable_from_another_machine(http: str, sink: str, expected: bool) -> None:
    assert is_unreachable_loopback(http, sink) is expected
