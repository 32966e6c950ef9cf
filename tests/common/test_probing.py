"""The constants that gateways and workers must agree on."""

from common.probing import NOTICE_SECONDS, POLL_INTERVAL_SECONDS, PROBE_TIMEOUT_SECONDS


def test_every_gateway_notices_a_worker_that_drains_before_it_stops() -> None:
    """The slowest one has just begun a probe whose answer was under way, and needs another one."""
    assert NOTICE_SECONDS > POLL_INTERVAL_SECONDS + PROBE_TIMEOUT_SECONDS
