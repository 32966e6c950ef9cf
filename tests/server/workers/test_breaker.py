"""When a worker counts as suspect, and how it comes back."""

from server.workers.breaker import Breaker


def test_failures_in_a_row_make_a_worker_suspect() -> None:
    breaker = Breaker()
    for _ in range(4):
        breaker.record_failure(0.0)
    assert not breaker.is_suspect
    breaker.record_failure(0.0)
    assert breaker.is_suspect


def test_a_success_in_between_keeps_a_worker_unless_most_requests_fail() -> None:
    seldom, mostly = Breaker(), Breaker()
    for number in range(100):
        seldom.record_success(0.0) if number % 3 else seldom.record_failure(0.0)
        mostly.record_failure(0.0) if number % 3 else mostly.record_success(0.0)
    assert not seldom.is_suspect
    assert mostly.is_suspect


def test_an_ejected_worker_gets_one_request_at_a_time_after_a_while() -> None:
    breaker = Breaker()
    seconds = breaker.eject(100.0)
    assert not breaker.admits(100.0 + seconds / 2, 0)
    assert breaker.admits(100.0 + seconds, 0)
    assert not breaker.admits(100.0 + seconds, 1)


def test_a_failed_trial_ejects_for_twice_as_long() -> None:
    breaker = Breaker()
    first = breaker.eject(0.0)
    breaker.record_failure(10.0)
    assert not breaker.admits(10.0 + 1.9 * first, 0)
    assert breaker.admits(10.0 + 2 * first, 0)


def test_ejections_do_not_grow_beyond_half_a_minute() -> None:
    breaker = Breaker()
    assert [breaker.eject(0.0) for _ in range(6)] == [2, 4, 8, 16, 30, 30]


def test_a_successful_trial_admits_the_worker_with_a_rising_share() -> None:
    breaker = Breaker()
    breaker.eject(0.0)
    assert breaker.is_ejected()
    breaker.record_success(10.0)
    assert not breaker.is_ejected()
    assert breaker.admits(10.0, 50)
    shares = [breaker.share(10.0 + seconds) for seconds in (0, 1, 2.5, 5, 100)]
    assert shares == [0.1, 0.2, 0.5, 1.0, 1.0]


def test_a_worker_that_was_never_ejected_gets_its_whole_share() -> None:
    breaker = Breaker()
    breaker.record_success(0.0)
    assert breaker.share(0.0) == 1.0
