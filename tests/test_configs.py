"""Every config's `:runlocal` is run: the same code path as the experiment, in little."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.harness import idx, shapes

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(p.stem for p in (ROOT / "configs").glob("*.py") if not p.stem.startswith("_"))


def in_its_place(name: str, folder: Path) -> list[str]:
    """Flags that name random images where an experiment's own lie outside the repository."""
    if name == "images":
        return [f"--config.data.name={shapes(folder)}"]
    if not name.startswith("fashion"):
        return []
    rng = np.random.default_rng(0)
    for split, n in (("train", 300), ("t10k", 100)):
        for kind, array in (("images-idx3", rng.integers(0, 256, (n, 28, 28))), ("labels-idx1", np.arange(n) % 10)):
            (folder / f"{split}-{kind}-ubyte").write_bytes(idx(array))
    return [f"--config.data.name=idx:{folder}"]


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_runlocal(name, tmp_path, tmp_path_factory):
    """Breaks if a shipped experiment does not run from its first step to its report."""
    data = str(tmp_path_factory.getbasetemp() / "tfds")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "TFDS_DATA_DIR": data}
    command = [sys.executable, "-m", "ddo_jax.main", f"--config=configs/{name}.py:runlocal", f"--workdir={tmp_path}"]
    command += in_its_place(name, tmp_path_factory.mktemp("data"))
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "after DDO" in (tmp_path / "report" / "report.md").read_text()
    assert (tmp_path / "best" / "params.safetensors").exists()
