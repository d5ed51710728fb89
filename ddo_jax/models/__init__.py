"""Networks as Flax (Linen) modules, nothing else: no losses, no samplers, no file formats.

Every denoiser has the call signature ``net(x, c_noise, labels, augment_labels=None, train=False) -> F``
and is wrapped by `ddo_jax.models.edm.EDMPrecond`, which turns the raw output F into the denoised image D.
"""
