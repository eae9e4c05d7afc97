"""Progress bars count what was done, whether they are told of each iteration or not."""

from jaxrefine.runs.progress import Bars


def test_a_bar_is_where_the_run_is(capsys):
    with Bars() as bars:
        advance = bars.next("resumed, told of every tenth", 300, 10)
        places = []
        for row in ({"iteration": 20}, {"iteration": 30, "r_max": 7}, {}):
            advance(None, row)
            places.append(bars._bar.n)
        endless = bars.next("without an end", None)
        endless(None, {"resolution_in_angstroms": 36.857})
        assert (bars._bar.n, bars._bar.total) == (1, None)
    assert places == [20, 30, 31]
    assert "resolution=36.9 Å" in capsys.readouterr().err
