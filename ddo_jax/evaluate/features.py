"""Feature networks by name: what turns uint8 images into the vectors whose distribution is compared."""

import dataclasses
import io
from collections.abc import Callable

import numpy as np
from etils import epath

from ddo_jax import files
from ddo_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class FeatureNet:
    """A frozen network.

    Attributes:
      name, digest: of the network and its weights, in every record.
      metric: name of the Fréchet distance in its features. scale: factor it is reported with.
      apply: uint8 [N, H, W, C] -> (features [N, D], logits [N, K] or None), float32 NumPy.
    """

    name: str
    digest: str
    metric: str
    scale: float
    apply: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray | None]]

    def named(self, num: int) -> str:
        """The metric's name for `num` images: fewer than 50,000 are never called "fid"."""
        return self.metric if self.metric != "fid" or num >= 50_000 else f"fid{num / 1000:g}k"


def _digits(train, cache: epath.Path) -> FeatureNet:
    from ddo_jax.evaluate import digits

    path = cache / "features-digits.npz"
    if not path.exists():
        real = train.read(np.arange(len(train)))
        fitted = digits.train(real["image"], real["label"], train.num_classes)
        layers = [dict(zip("wb", layer, strict=True)) for layer in fitted.layers]
        buffer = io.BytesIO()
        np.savez(buffer, **{f"{kind}{i}": x for i, layer in enumerate(layers) for kind, x in layer.items()})
        files.write_bytes(path, buffer.getvalue())
    with path.open("rb") as f, np.load(f) as arrays:
        layers = tuple((arrays[f"w{i}"], arrays[f"b{i}"]) for i in range(len(arrays) // 2))
    classifier = digits.Classifier(layers)

    def apply(images):
        features, logits = digits.features_and_logits(layers, images)
        return np.asarray(features), np.asarray(logits)

    return FeatureNet("digits classifier, 32 features", classifier.digest, "fd_x100", 100.0, apply)


NETWORKS = {"digits": _digits}


def check_name(name: str) -> None:
    """Raises UserError for an unknown network."""
    if name not in NETWORKS:
        raise UserError(f"config.eval.network: {name!r}; allowed: {', '.join(sorted(NETWORKS))}")


def get_features(name: str, train, cache: epath.PathLike) -> FeatureNet:
    """The feature network `name`.

    Args:
      name: config.eval.network. train: source of the training split. cache: folder for fitted weights.

    Raises:
      UserError: unknown name.
    """
    check_name(name)
    return NETWORKS[name](train, epath.Path(cache))
