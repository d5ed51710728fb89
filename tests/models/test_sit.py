from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from ddo_jax.models.sit import cudnn_attends


@pytest.mark.parametrize(
    ("dtype", "head_width", "capability", "fits"),
    [
        (jnp.bfloat16, 72, "9.0", True),  # XL/2 on an H100
        (jnp.float16, 64, "8.6", True),
        (jnp.float32, 72, "9.0", False),
        (jnp.bfloat16, 12, "9.0", False),
        (jnp.bfloat16, 136, "9.0", False),
        (jnp.bfloat16, 72, "7.5", False),
        (jnp.bfloat16, 72, "gfx942", False),
    ],
)
def test_cudnn_takes_what_it_can(dtype, head_width, capability, fits):
    """Breaks if half precision ends with cuDNN's refusal on an older GPU, or of a narrow head."""
    assert cudnn_attends(dtype, head_width, SimpleNamespace(compute_capability=capability)) is fits


def test_a_cpu_has_no_cudnn():
    assert not cudnn_attends(jnp.bfloat16, 72, jax.devices("cpu")[0])
