"""What the diffusion families share: examples, the one-evaluation score, both samplers (specs/ddo.md section 2).

examples = {"x": float32 [B,H,W,C], pixels in [-1, 1] or scaled latents, "label": int32 [B]};
draws = {"sigma": [B], "eps": [B,H,W,C]}.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from ddo_jax.core import ddo, dpm_solver, edm, samplers
from ddo_jax.errors import UserError
from ddo_jax.families.base import (
    DIFFUSION_SAMPLER,
    HALF,
    PHASES,
    Draws,
    Examples,
    Family,
    Guidance,
    PyTree,
    Spec,
    own_settings,
)

LEAST_STEPS = {"dpmv3": 2}  # one step is D at sigma_max: the mean image
MOST_STEPS = 10_000
CONFIG_KEYS = {f"{phase}.{key}" for phase in PHASES for key in ("p_mean", "p_std")}
CONFIG_KEYS |= {"ddo.p_std_from", *(f"sampler.{key}" for key in DIFFUSION_SAMPLER)}


@dataclasses.dataclass(frozen=True)
class Diffusion(Family):
    """What one network of these families is.

    Attributes:
      module: EDMPrecond or EDM2Precond. codec: Pixels or Latents. model: the config.model they were built from.
      precision: of every matrix product and convolution. r is a small difference, so it is explicit.
      sampling: dtype of the image path when sampling: "float32", "bfloat16" or "float16".
    """

    module: Any
    codec: Any
    model: dict = dataclasses.field(hash=False)
    precision: str
    sampling: str

    name = ""  # of the family
    config_keys = frozenset(CONFIG_KEYS)
    heun_grid = "float64"  # rounding of Heun's time grid in the released sampler of the family

    @functools.cached_property
    def spec(self) -> Spec:
        return Spec(
            name=self.name,
            num_classes=self.module.label_dim,
            image_shape=self.codec.image_shape,
            levels=self.codec.levels,
            data=self.codec.data,
            stored=self.codec.stored,
            guidance=Guidance("network"),
            config_keys=self.config_keys,
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of x."""
        return (self.module.img_resolution, self.module.img_resolution, self.module.img_channels)

    def one_hot(self, labels: jax.Array) -> Any:
        """[B] -> [B, K]; id == K ("no label") gives the zero row; None for unconditional networks."""
        return jax.nn.one_hot(labels, self.module.label_dim) if self.module.label_dim else None

    def apply(
        self,
        module: Any,
        params: PyTree,
        frozen: PyTree,
        x: jax.Array,
        sigma: jax.Array,
        labels: jax.Array,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        buffers = {k: v for k, v in frozen.items() if k != "vae"}
        with jax.default_matmul_precision(self.precision):
            return module.apply({"params": params, **buffers}, x, sigma, self.one_hot(labels), *args, **kwargs)

    def inputs(self, examples: Examples, draws: Draws) -> Any:
        return edm.edm_inputs(examples["x"], draws["sigma"], draws["eps"], self.module.sigma_data)

    def companions(self) -> dict:
        return self.codec.companions()

    # -- the seam (families/base.py) -----------------------------------------------------------------------

    def init(self, key: jax.Array) -> tuple[PyTree, PyTree]:
        label = self.one_hot(jnp.zeros((1,), jnp.int32))
        variables = dict(self.module.init(key, jnp.zeros((1, *self.shape)), jnp.ones((1,)), label))
        return variables.pop("params"), variables

    def encode(self, frozen: PyTree, record: dict, key: jax.Array) -> Examples:
        with jax.default_matmul_precision(self.precision):
            return {"x": self.codec.encode(frozen, record["image"], key), "label": record["label"]}

    def decode(self, frozen: PyTree, examples: Examples) -> jax.Array:
        with jax.default_matmul_precision(self.precision):
            return self.codec.decode(frozen, examples["x"])

    def store(self, frozen: PyTree, examples: Examples) -> dict:
        return {"image": self.codec.store(examples["x"]), "label": examples["label"]}

    def draw(self, key: jax.Array, n: int, sigma_law: tuple) -> Draws:
        key_sigma, key_eps = jax.random.split(key)
        sigma = edm.noise_level(jax.random.normal(key_sigma, (n,)), *sigma_law)
        return {"sigma": sigma, "eps": jax.random.normal(key_eps, (n, *self.shape))}

    def score(self, params: PyTree, frozen: PyTree, examples: Examples, draws: Draws, **kwargs: Any) -> PyTree:
        """The raw network output F [B,H,W,C]."""
        x_in, c_noise, _ = self.inputs(examples, draws)
        return self.apply(self.module, params, frozen, x_in, c_noise, examples["label"], method="raw", **kwargs)

    def ratio(self, s: PyTree, s_ref: PyTree, examples: Examples, draws: Draws) -> jax.Array:
        return ddo.diffusion_log_ratio(s, s_ref, self.inputs(examples, draws)[2])

    def nll(self, s: PyTree, examples: Examples, draws: Draws) -> jax.Array:
        """lambda(sigma) |D - x|^2 = |F - F_hat|^2, summed over pixels (specs/edm.md section 10)."""
        return jnp.sum(jnp.square(s - self.inputs(examples, draws)[2]), axis=(1, 2, 3))

    def mle_loss(self, params: PyTree, frozen: PyTree, examples: Examples, draws: Draws, key: jax.Array) -> jax.Array:
        f = self.score(params, frozen, examples, draws, train=True, rngs={"dropout": key})
        return self.nll(f, examples, draws)

    def latents(self, keys: jax.Array) -> jax.Array:
        return image_noise(keys, 0, self.shape)

    def guide(self, params: PyTree, frozen: PyTree, labels: jax.Array) -> Any:
        """D(x, sigma), what `sample` of any other network of these shapes takes as its guide."""
        dtype = HALF.get(self.sampling)
        module = self.module.clone(dtype=dtype) if dtype else self.module

        def denoise(x: jax.Array, sigma: jax.Array) -> jax.Array:
            return self.apply(module, params, frozen, x, sigma, labels).astype(x.dtype)

        return denoise

    def sample(
        self, nets: tuple, frozen: PyTree, labels: jax.Array, latents: Any, noise: Any, settings: Any
    ) -> Examples:
        params, guide = nets
        denoise = self.guide(params, frozen, labels)
        if guide is not None:
            denoise = samplers.guided(denoise, *guide)

        def churn(i: Any) -> jax.Array:
            keyed = jnp.issubdtype(noise.dtype, jax.dtypes.prng_key)
            return image_noise(noise, i + 1, self.shape) if keyed else noise[i]

        if isinstance(settings, dpm_solver.DPMSettings):
            return {"x": dpm_solver.dpm_sample(denoise, latents, settings), "label": labels}
        return {"x": samplers.heun_sample(denoise, latents, settings, churn), "label": labels}

    def settings(self, sampler: Any) -> Any:
        """config.sampler -> HeunSettings (its field names are the config's keys) or DPMSettings.

        Raises:
          UserError: what cannot be sampled with.
        """
        given = own_settings(sampler, DIFFUSION_SAMPLER)
        solver = given.pop("solver", "heun")
        try:
            for key, value in given.items():
                if math.isnan(value):  # also of those that this solver does not use
                    raise ValueError(f"{key} is nan: it must be a number")
            least, most = LEAST_STEPS.get(solver, 1), MOST_STEPS
            if not least <= given.get("num_steps", least) <= most:
                raise ValueError(f"num_steps is {given['num_steps']}: allowed are {least} to {most:,} with {solver}")
            if solver == "heun":
                heun = samplers.HeunSettings(**given, grid=self.heun_grid)
                samplers.heun_schedule(heun)  # refuses what cannot be sampled with
                return heun
            if solver == "dpmv3":
                if given.get("s_churn"):
                    raise ValueError(f"s_churn is {given['s_churn']}: solver dpmv3 adds no noise; set it to 0")
                shared = ("num_steps", "sigma_min", "sigma_max")
                dpm = dpm_solver.DPMSettings(**{k: given[k] for k in shared if k in given})
                dpm_solver.dpm_schedule(dpm)
                return dpm
            raise ValueError(f"solver is {solver!r}; allowed: heun, dpmv3")
        except (TypeError, ValueError, ArithmeticError) as e:
            raise UserError(f"config.sampler: {e}") from None


def image_noise(keys: jax.Array, stream: int, shape: tuple[int, ...]) -> jax.Array:
    """Unit normals [B, *shape]; stream 0 of an image's own key makes its latents, i + 1 its step i."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, stream), shape))(keys)
