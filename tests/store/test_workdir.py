"""The folder of a run: of two jobs that begin at once."""

import pytest

from ddo_jax import config as configs
from ddo_jax import files
from ddo_jax.errors import UserError
from ddo_jax.store import workdir as workdirs


def test_two_jobs_with_two_configs_begin_at_once(tmp_path, monkeypatch):
    """Breaks if the second of them goes on in the first one's workdir."""
    mine, other = configs.base(), configs.base()
    other.seed = 7
    tried = workdirs._try_out

    def another_is_first(workdir):
        tried(workdir)
        files.write_sealed(workdir / "config.json", other.to_dict())

    monkeypatch.setattr(workdirs, "_try_out", another_is_first)
    with pytest.raises(UserError, match="was made with another config .config.seed: 7 -> 0."):
        workdirs.open_workdir(mine, tmp_path / "run")
