"""What requests learn of the end of their process."""

from server.shutdown import Shutdown


def test_what_runs_at_the_end_of_the_grace_is_called_once() -> None:
    shutdown, calls = Shutdown(), list[str]()
    with shutdown.at_end_of_grace(lambda: calls.append("ended before")):
        pass
    with shutdown.at_end_of_grace(lambda: calls.append("running")):
        shutdown.start_draining()
        assert (shutdown.is_draining, calls) == (True, [])
        shutdown.end_grace()
        assert calls == ["running"]


def test_what_starts_after_the_grace_is_called_at_once() -> None:
    shutdown, calls = Shutdown(), list[str]()
    shutdown.end_grace()
    assert shutdown.is_draining
    with shutdown.at_end_of_grace(lambda: calls.append("late")):
        assert calls == ["late"]
