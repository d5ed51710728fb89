"""The digits are prepared once a session, never in the user's own directory."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def digits_directory(tmp_path_factory):
    directory = tmp_path_factory.getbasetemp() / "tfds"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(directory))
        yield directory
