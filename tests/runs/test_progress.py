"""Progress bars count what was done, whether they are told of each iteration or not."""

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
