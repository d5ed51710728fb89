"""The experiments; `ddo_jax.configs` in a wheel. `python -m ddo_jax.main --config=NAME[:VARIANT]`."""
