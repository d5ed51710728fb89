"""Area and bicubic matrices against the public reference (specs/var.md section 1)."""

from pathlib import Path

import numpy as np
import pytest

from ddo_jax.core.stats.resample import area_matrix, bicubic_matrix

GOLDEN = dict(np.load(Path(__file__).parents[2] / "goldens" / "interp_small.npz"))
MATRIX = {"area": area_matrix, "bicubic": bicubic_matrix}
PAIRS = sorted({key.rpartition("/")[0] for key in GOLDEN if "/" in key})


def test_the_goldens_have_every_pair_of_the_released_scales():
    pairs = {f"bicubic/{p}to16" for p in (1, 2, 3, 4, 5, 6, 8, 10, 13)}
    pairs |= {f"area/16to{p}" for p in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)}
    pairs |= {f"bicubic/{p}to32" for p in (1, 2, 3, 4, 6, 9, 13, 18, 24)}
    assert pairs <= set(PAIRS) and len(PAIRS) == 55 and len(GOLDEN) == 3 * 55 + 1


@pytest.mark.parametrize("pair", PAIRS)
def test_goldens(pair):
    kind, sizes = pair.split("/")
    m = MATRIX[kind](*map(int, sizes.split("to")))
    assert m.dtype == np.float64 and m.shape == GOLDEN[f"{pair}/M"].shape
    np.testing.assert_allclose(m, GOLDEN[f"{pair}/M"], rtol=0, atol=3e-15)
    y = m @ GOLDEN[f"{pair}/x"].astype(np.float64) @ m.T
    np.testing.assert_allclose(y, GOLDEN[f"{pair}/y"], rtol=1e-6, atol=1e-6)  # the reference is float32


@pytest.mark.parametrize("kind", MATRIX)
def test_identities(kind):
    for n in range(1, 20):
        np.testing.assert_array_equal(MATRIX[kind](n, n), np.eye(n))
        for m in range(1, 20):
            matrix = MATRIX[kind](n, m)
            np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-14)  # constants stay
            np.testing.assert_allclose(matrix, matrix[::-1, ::-1], atol=1e-14)  # left and right are alike


def test_one_array_serves_all_and_cannot_be_changed():
    for make in MATRIX.values():
        assert make(4, 3) is make(4, 3)
        with pytest.raises(ValueError, match="read-only"):
            make(4, 3)[0, 0] = 1


@pytest.mark.parametrize("kind", MATRIX)
@pytest.mark.parametrize("sizes", [(0, 3), (3, 0), (-1, 2)])
def test_sizes_below_one_are_refused(kind, sizes):
    with pytest.raises(ValueError, match=rf"from {sizes[0]} to {sizes[1]}: both sizes must be at least 1"):
        MATRIX[kind](*sizes)
