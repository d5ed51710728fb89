"""Every config's `:runlocal` is run: the same code path as the experiment, in little."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(p.stem for p in (ROOT / "configs").glob("*.py") if not p.stem.startswith("_"))


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_runlocal(name, tmp_path, tmp_path_factory):
    """Breaks if a shipped experiment does not run from its first step to its report."""
    data = str(tmp_path_factory.getbasetemp() / "tfds")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "TFDS_DATA_DIR": data}
    command = [sys.executable, "-m", "ddo_jax.main", f"--config=configs/{name}.py:runlocal", f"--workdir={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "after DDO" in (tmp_path / "report" / "report.md").read_text()
    assert (tmp_path / "best" / "params.safetensors").exists()
