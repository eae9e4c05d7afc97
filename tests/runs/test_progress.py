"""Progress bars count what was done, whether they are told of each iteration or not."""

import sys
import time
from itertools import groupby

import pytest

from jaxrefine.runs.progress import Bars


def shown_last(text):
    return text.replace("\n", "\r").rstrip("\r").split("\r")[-1]


@pytest.fixture
def bars_on_terminal(monkeypatch):
    """A function that opens bars on a standard error that is a terminal."""

    def opened():
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
        return Bars()

    return opened


@pytest.fixture
def clock(monkeypatch):
    """A function that lets seconds pass."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    return wait


# --- on a terminal


def test_a_bar_is_where_the_run_is(bars_on_terminal, capsys):
    with bars_on_terminal() as bars:
        advance = bars.next("resumed, told of every tenth", 300, 10)
        for row in ({"iteration": 20}, {"iteration": 30, "r_max": 7}, {}):
            advance(None, row)
    assert "31/300" in shown_last(capsys.readouterr().err)


def test_a_bar_without_an_end(bars_on_terminal, capsys):
    with bars_on_terminal() as bars:
        bars.next("first", 4)
        endless = bars.next("without an end", None)
        endless(None, {"resolution_in_angstroms": 36.857})
    last = shown_last(capsys.readouterr().err)
    assert "without an end: 1it" in last and "resolution=36.9 Å" in last


def test_scores_have_the_name_of_what_they_are(bars_on_terminal, capsys):
    row = {"fold_score": 0.75, "gold_score": None}
    for gold, shown in ((None, False), (0.5, True)):
        with bars_on_terminal() as bars:
            bars.next("refining", 1)(None, row | {"gold_score": gold})
        last = shown_last(capsys.readouterr().err)
        assert "folds' FSC=0.750" in last
        assert ("half sets' FSC=0.500" in last) == shown


def test_the_stage_of_a_run_is_below_its_bar(bars_on_terminal, capsys):
    """Each in its turn, and the same one again in the next iteration."""
    with bars_on_terminal() as bars:
        bars.next("refining", 3)
        for stage, done in (("poses", 0), ("poses", 9), ("sums", 0), ("poses", 0)):
            bars.watch(stage, done, 9)
    shown = [
        line.strip().split(":")[0]
        for line in capsys.readouterr().err.replace("\n", "\r").split("\r")
        if ":" in line
    ]
    stages = [name for name, _ in groupby(n for n in shown if n != "refining")]
    assert stages == ["poses", "sums", "poses"]


def test_stages_without_a_bar_remain(bars_on_terminal, capsys):
    with bars_on_terminal() as bars:
        for stage in ("noise", "sums", "maps"):
            bars.watch(stage, 0, 4)
            bars.watch(stage, 4, 4)
    err = capsys.readouterr().err
    assert all(f"{stage}: 100%" in err for stage in ("noise", "sums", "maps"))


# --- in a log


def test_a_log_has_a_line_now_and_then(capsys, clock):
    """Of each long iteration, and once a minute within a stage; of short ones fewer."""
    with Bars() as bars:
        advance = bars.next("refining", 64, 2)
        bars.watch("poses", 0, 100)
        for done in range(1, 101):
            clock(1.5)
            bars.watch("poses", done, 100)
        advance(None, {"iteration": 3, "r_max": 7})
        for iteration in range(4, 65):
            clock(3)
            bars.watch("sums", 0, 100)
            bars.watch("sums", 100, 100)
            advance(None, {"iteration": iteration, "r_max": 8})
    assert capsys.readouterr().err.splitlines() == [
        "poses: 40/100 [01:00<01:30]",
        "poses: 80/100 [02:00<00:30]",
        "refining: 3/64 [02:30<2:32:30, band=7]",
        *(
            f"refining: {n}/64 [{tqdm_time(150 + 3 * (n - 3))}<{left(n)}, band=8]"
            for n in (*range(7, 64, 4), 64)
        ),
    ]


def tqdm_time(seconds):
    return f"{int(seconds) // 60:02}:{int(seconds) % 60:02}"


def left(n):
    seconds = (150 + 3 * (n - 3)) / (n - 2) * (64 - n)
    return tqdm_time(seconds)


def test_stages_without_a_bar_have_a_line_each_in_a_log(capsys, clock):
    with Bars() as bars:
        for stage in ("noise", "sums"):
            for done in range(5):
                bars.watch(stage, done, 4)
                clock(1)
        bars.watch("maps", 0, 4)
    assert (
        capsys.readouterr().err == "noise: 4/4 [00:04<00:00]\nsums: 4/4 [00:04<00:00]\n"
    )


def test_what_is_interrupted_is_told_of_in_a_log(capsys, clock):
    """How far it came, once."""
    with pytest.raises(KeyboardInterrupt), Bars() as bars:
        advance = bars.next("without an end", None)
        for _ in range(3):
            advance(None, {})
            clock(1)
        raise KeyboardInterrupt
    assert capsys.readouterr().err == "without an end: 3 [00:03]\n"
