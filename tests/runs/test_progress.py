"""Progress bars count what was done, whether they are told of each iteration or not."""

from itertools import groupby

from jaxrefine.runs.progress import Bars


def shown_last(text):
    return text.replace("\n", "\r").rstrip("\r").split("\r")[-1]


def test_a_bar_is_where_the_run_is(capsys):
    with Bars() as bars:
        advance = bars.next("resumed, told of every tenth", 300, 10)
        for row in ({"iteration": 20}, {"iteration": 30, "r_max": 7}, {}):
            advance(None, row)
    assert "31/300" in shown_last(capsys.readouterr().err)


def test_a_bar_without_an_end(capsys):
    with Bars() as bars:
        bars.next("first", 4)
        endless = bars.next("without an end", None)
        endless(None, {"resolution_in_angstroms": 36.857})
    last = shown_last(capsys.readouterr().err)
    assert "without an end: 1it" in last and "resolution=36.9 Å" in last


def test_the_stage_of_a_run_is_below_its_bar(capsys):
    """Each in its turn, and the same one again in the next iteration."""
    with Bars() as bars:
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


def test_stages_without_a_bar_remain(capsys):
    with Bars() as bars:
        for stage in ("noise", "sums", "maps"):
            bars.watch(stage, 0, 4)
            bars.watch(stage, 4, 4)
    err = capsys.readouterr().err
    assert all(f"{stage}: 100%" in err for stage in ("noise", "sums", "maps"))
