"""Progress is a bar on a terminal and a few log lines elsewhere."""

import io
import logging

import pytest
from rich.console import Console

from qpcompile.progress import LogLines, memory, track


def test_no_terminal_writes_nothing_but_a_last_log_line(caplog: pytest.LogCaptureFixture) -> None:
    stream = io.StringIO()
    with caplog.at_level(logging.INFO, "qpcompile"), track("calibrate", 3, console=Console(file=stream)) as step:
        for _ in range(3):
            step()
    assert stream.getvalue() == ""
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("calibrate: 3 of 3 in ") and caplog.messages[0].endswith(" GiB")


def test_a_log_line_every_ten_seconds_with_time_left(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    lines = LogLines("calibrate", 10, clock=lambda: now)
    with caplog.at_level(logging.INFO, "qpcompile"):
        for _ in range(6):
            now += 4.0
            lines.step()
    assert [message.rsplit(",", 1)[0] for message in caplog.messages] == [
        "calibrate: 3 of 10, 28 s left",
        "calibrate: 6 of 10, 16 s left",
    ]


def test_terminal_shows_name_count_and_memory(caplog: pytest.LogCaptureFixture) -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=120)
    with caplog.at_level(logging.INFO, "qpcompile"), track("calibrate", 4, console=console) as step:
        for _ in range(4):
            step()
    assert "calibrate" in stream.getvalue() and "4/4" in stream.getvalue() and "GiB" in stream.getvalue()
    assert caplog.messages == []


@pytest.mark.parametrize("terminal", [True, False])
def test_a_failure_passes_through(terminal: bool) -> None:
    console = Console(file=io.StringIO(), force_terminal=terminal)
    with pytest.raises(KeyboardInterrupt), track("calibrate", 4, console=console) as step:
        step()
        raise KeyboardInterrupt


def test_memory_is_that_of_this_process() -> None:
    amount, unit = memory().split()
    assert float(amount) > 0.005 and unit == "GiB"
