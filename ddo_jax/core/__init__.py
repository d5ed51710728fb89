"""The mathematics of DDO as pure functions: arrays in, arrays out.

Nothing here knows a model, a trainer, a device or a random key. Only jax, numpy, jaxtyping and chex are imported,
so every file can be lifted into another code base as it is. Start with `ddo.py`.
"""
