"""Phases of a start: a line when each begins, reminders while it is slow, and the seconds of all at the end."""

import logging
import re
import threading

import pytest

from common import phases
from common.phases import Phases

LOG = logging.getLogger("test.phases")


def test_each_phase_begins_with_a_line_and_the_summary_has_the_seconds(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", LOG.name)
    start = Phases(LOG)
    with start.phase("reading weights"):
        pass
    with start.phase("warming up"):
        pass
    assert [record.getMessage() for record in caplog.records] == ["reading weights", "warming up"]
    assert re.fullmatch(r"\d+\.\d s \(reading weights \d+\.\d s, warming up \d+\.\d s\)", start.summary())


class Reminders(logging.Handler):
    """Collects messages, and tells when one is a reminder."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []
        self.reminded = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())
        if "still" in self.messages[-1]:
            self.reminded.set()


def test_a_slow_phase_says_again_what_it_does_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phases, "_REMINDER_SECONDS", 0.01)
    reminders = Reminders()
    LOG.addHandler(reminders)
    LOG.setLevel("INFO")
    try:
        with Phases(LOG).phase("reading weights", "the disk is slow"):
            assert reminders.reminded.wait(30)
    finally:
        LOG.removeHandler(reminders)
    assert reminders.messages[0] == "reading weights"
    assert re.fullmatch(r"still reading weights after \d+ s: the disk is slow", reminders.messages[1])


def test_a_phase_that_fails_sends_no_more_reminders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phases, "_REMINDER_SECONDS", 600)
    with pytest.raises(ValueError, match="damaged"), Phases(LOG).phase("reading weights"):
        raise ValueError("damaged")
    reminders = [thread for thread in threading.enumerate() if "_remind" in thread.name]
    for thread in reminders:
        thread.join(30)
    assert not any(thread.is_alive() for thread in reminders)
