"""Where there is no terminal, what takes long says a line a minute, and what does not says nothing."""

import io

import pytest
from rich.console import Console

from ms_pangu_quant.cli.console import Bars


@pytest.fixture
def clock():
    return [0.0]


def bars_of(clock, terminal):
    return Bars(
        console=Console(file=io.StringIO(), force_terminal=terminal, width=200),
        disable=not terminal,
        get_time=lambda: clock[0],
        auto_refresh=False,
    )


def lines(bars):
    return bars.console.file.getvalue().splitlines()


def test_a_line_a_minute_with_what_is_done_and_what_is_left(clock):
    with bars_of(clock, terminal=False) as bars:
        task = bars.add_task("trying transforms", total=40, kind="count")
        for _ in range(40):
            clock[0] += 45
            bars.advance(task)
    assert lines(bars)[:2] == [
        "trying transforms: 2/40 in 2 min, 28 min left",
        "trying transforms: 4/40 in 3 min, 27 min left",
    ]
    assert len(lines(bars)) == 19  # every other block; the last is told by what follows


def test_what_is_done_within_a_minute_or_told_otherwise_says_nothing(clock):
    with bars_of(clock, terminal=False) as bars:
        quick, told = bars.add_task("hashing", total=3, kind="bytes"), bars.add_task("blocks", total=9, lines=True)
        for _ in range(3):
            clock[0] += 19
            bars.advance(quick)
            bars.update(quick, total=3)
        for _ in range(9):
            clock[0] += 600
            bars.advance(told)
    assert lines(bars) == []


def test_a_task_that_begins_late_has_a_minute_of_its_own(clock):
    with bars_of(clock, terminal=False) as bars:
        clock[0] = 1000
        task = bars.add_task("hashing", total=4 * 10**9, kind="bytes")
        clock[0] += 30
        bars.advance(task, 10**9)
        assert lines(bars) == []
        clock[0] += 40
        bars.update(task, advance=10**9)
    assert lines(bars) == ["hashing: 2.0/4.0 GB in 70 s, 70 s left"]
