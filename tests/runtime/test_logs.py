"""Which messages of the log come to the console, and which to a file."""

import logging
import re
import sys
from types import SimpleNamespace

import pytest

from hpr_jax.runtime import logs
from hpr_jax.runtime.logs import log_to_console, log_to_file

log = logging.getLogger("hpr_jax")
progress = logging.getLogger("hpr_jax.progress")

pytestmark = pytest.mark.usefixtures("restored_log")


@pytest.fixture
def clock(monkeypatch):
    """A clock in place of the console's, which stands still; `now` is its time in seconds."""
    clock = SimpleNamespace(now=1000.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(logs, "time", clock)
    return clock


def printed(capsys):
    """The new lines of standard output; there are none of standard error."""
    out, error = capsys.readouterr()
    assert error == ""
    return out.splitlines()


class TestProgress:
    SECONDS = (0, 1, 59.9, 60, 61, 119, 120.5, 1000, 1001)

    def test_without_a_terminal_there_is_a_line_a_minute(self, clock, monkeypatch, capsys):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
        log_to_console()
        for seconds in self.SECONDS:
            clock.now = 1000 + seconds
            progress.info("after %g seconds", seconds)
        assert printed(capsys) == [f"after {seconds} seconds" for seconds in (0, 60, 120.5, 1000)]

    def test_a_terminal_has_a_bar_instead(self, clock, monkeypatch, capsys):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        log_to_console()
        for seconds in self.SECONDS:
            clock.now = 1000 + seconds
            progress.info("after %g seconds", seconds)
        assert printed(capsys) == []

    @pytest.mark.parametrize("terminal", [False, True])
    def test_other_messages_always_come(self, clock, monkeypatch, capsys, terminal):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
        log_to_console()
        for number in range(3):
            log.info("message %d", number)
        log.warning("warning")
        assert printed(capsys) == ["message 0", "message 1", "message 2", "warning"]


class TestConsole:
    def test_a_level_leaves_out_what_is_below(self, capsys):
        log_to_console(logging.WARNING)
        log.info("how it goes")
        log.warning("what is wrong")
        assert printed(capsys) == ["what is wrong"]

    def test_nothing_comes_twice(self, capsys, caplog):
        log_to_console()
        log_to_console()
        log.info("once")
        assert printed(capsys) == ["once"]
        assert caplog.messages == []


class TestFile:
    def test_it_has_every_line_of_progress_with_time_and_level(self, clock, tmp_path, capsys):
        log_to_console()
        log_to_file(tmp_path / "run/train.log")
        for number in range(3):
            progress.info("step %d", number)
        log.warning("what is wrong")
        lines = (tmp_path / "run/train.log").read_text().splitlines()
        assert [re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ", "", line) for line in lines] == [
            "INFO step 0",
            "INFO step 1",
            "INFO step 2",
            "WARNING what is wrong",
        ]
        assert printed(capsys) == ["step 0", "what is wrong"]

    def test_a_run_that_goes_on_adds_to_it(self, tmp_path):
        log_to_console()
        for number in range(2):
            log_to_file(tmp_path / "train.log")
            log.info("start %d", number)
        assert re.findall("start .", (tmp_path / "train.log").read_text()) == ["start 0", "start 1"]

    def test_another_run_has_a_file_of_its_own(self, tmp_path):
        log_to_console()
        for name in ("a", "b"):
            log_to_file(tmp_path / name / "train.log")
            log.info("run %s", name)
        assert (tmp_path / "a/train.log").read_text().endswith(" INFO run a\n")
        assert re.findall("run .", (tmp_path / "b/train.log").read_text()) == ["run b"]
