"""--sweep: what is parsed and refused, which value is best, what the picture shows."""

import pytest

from ddo_jax.errors import UserError
from ddo_jax.evaluate import sweep

KINDS = {"guidance": float, "num_steps": int}
ROWS = {
    0.0: {"fid": 5.0, "is": 20.0, "is_std": 1.0, "precision5k": 0.5},
    1.5: {"fid": 3.0, "is": 40.0, "is_std": 0.5, "precision5k": 0.5},
    3.0: {"fid": 4.0, "is": 50.0, "is_std": 2.0, "precision5k": 0.5},
}


@pytest.mark.parametrize(
    "text, words",
    [
        ("cfg=0,1", "--sweep: 'cfg'; allowed: guidance, num_steps, as in"),
        ("guidance", "allowed: numbers"),
        ("guidance=0,x", "allowed: numbers .float., as in guidance=0,1,2"),
        ("num_steps=8,1.5", "allowed: numbers .int."),
        ("guidance=1", "two or more values, all different"),
        ("guidance=1,1.0", "two or more values, all different"),
    ],
)
def test_what_is_refused(text, words):
    """Breaks if a sweep of nothing, or of what the sampler does not know, starts."""
    with pytest.raises(UserError, match=words):
        sweep.parse(text, KINDS)


def test_the_best_value_is_marked():
    """Breaks if higher and lower are mixed up, or a spread or a draw is called best."""
    assert sweep.parse("num_steps=8,16", KINDS) == ("num_steps", [8, 16])
    header, *lines = [line.split() for line in sweep.table("guidance", ROWS).splitlines()]
    assert header == ["guidance", "fid", "is", "is_std", "precision5k"]
    assert lines == [["0", "5", "20", "1", "0.5"], ["1.5", "3*", "40", "0.5", "0.5"], ["3", "4", "50*", "2", "0.5"]]


def test_the_picture_has_the_trade_off():
    """Breaks if FID over IS is not the first panel, its points lose their values, or a spread gets a panel."""
    panels = sweep.figure("guidance", ROWS, "title").axes
    assert [(a.get_xlabel().split()[0], a.get_ylabel().split()[0]) for a in panels] == [
        ("is", "fid"),
        *(("guidance", name) for name in ("fid", "is", "precision5k")),
    ]
    (line,) = panels[0].lines
    assert line.get_xydata().tolist() == [[20, 5], [40, 3], [50, 4]]
    assert [t.get_text() for t in panels[0].texts] == ["0", "1.5", "3"]
    few = {v: {"fd_x100": n["fid"]} for v, n in ROWS.items()}
    assert len(sweep.figure("guidance", few, "title").axes) == 1
