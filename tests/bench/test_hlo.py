"""What benchmarks.hlo reads off a compiled program."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import hlo  # noqa: E402

PROGRAM = """HloModule jit_step, is_scheduled=true

%cond.1 (arg: (s32[], f32[8])) -> pred[] {
  %arg = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %most = s32[] constant(5)
  ROOT %less = pred[] compare(%i, %most), direction=LT
}

%body.1 (arg: (s32[], f32[8])) -> (s32[], f32[8]) {
  %x = f32[8]{0} get-tuple-element(%arg), index=1
  %ar = f32[8]{0:T(128)} all-reduce(%x), to_apply=%sum, metadata={op_name="jit(step)/while/body/block3/dot"}
}

ENTRY %main (p: f32[4]) -> f32[16] {
  %ag = (f32[4]{0}, f32[16]{0}) all-gather-start(%p), dimensions={0}, metadata={op_name="jit(step)/gather"}
  %agd = f32[16]{0} all-gather-done(%ag)
  %cp = (bf16[4,2]{1,0}, bf16[4,2]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%q), channel_id=1
  %w = (s32[], f32[8]{0}) while(%init), condition=%cond.1, body=%body.1
  %v = (s32[], f32[8]{0}) while(%init), condition=%c, body=%body.1, backend_config={"known_trip_count":{"n":"3"}}
}
"""


def test_collectives_are_counted_as_often_as_they_run():
    """Breaks if a loop's collectives count once, a start and its end twice, or operands as what is received."""
    found = hlo.summary(PROGRAM)
    assert found == {
        "all-gather": {"written": 1, "run": 1, "bytes": 64},
        "all-reduce": {"written": 1, "run": 5 + 3, "bytes": 8 * 32},
        "collective-permute": {"written": 1, "run": 1, "bytes": 16},
    }
    assert ("all-reduce", 8, 32, "jit(step)/while/body/block3/dot") in hlo.collectives(PROGRAM)


def test_the_calls_behind_them_are_listed(tmp_path, monkeypatch, capsys):
    """Breaks if the command does not name what asked for a collective."""
    (tmp_path / "program.txt").write_text(PROGRAM)
    monkeypatch.setattr(sys, "argv", ["hlo", str(tmp_path / "program.txt"), "all-reduce"])
    hlo.main()
    assert capsys.readouterr().out.split() == ["all-reduce", "8", "0.00", "MB", "jit(step)/while/body/blockN/dot"]


@pytest.mark.parametrize(("shape", "sizes"), [("pred[3]", [3]), ("f8e4m3fn[2]", [2]), ("s4[4]", [2]), ("f32[]", [4])])
def test_bytes_of_odd_types(shape, sizes):
    """Breaks if a type of a few bits counts as bytes."""
    assert hlo.array_bytes(shape) == sizes
