"""Feature networks by name: what turns uint8 images into the vectors whose distribution is compared.

inception   FID-Inception of December 2015, 2048 features: FID, sFID, IS, precision and recall, KID
dinov2      DINOv2 ViT-L/14, 1024 features: FD-DINOv2
efficientnet  EfficientNet-Lite0, 1280 features: small, free, of photographs; compared with its like only
classifier  a small network fitted on the training split of the data (`classifier`); of the digits it is called "digits"
"""

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from ddo_jax import convert, files, sharding
from ddo_jax.convert import names
from ddo_jax.convert.inert import UnsafeOrDamaged
from ddo_jax.errors import UserError
from ddo_jax.evaluate import classifier
from ddo_jax.evaluate.records import named

Vectors = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class FeatureNet:
    """A frozen network.

    Attributes:
      name, digest: of the network and its weights, in every record.
      metric: name of the Fréchet distance in its features. scale: factor it is reported with.
      apply: uint8 [N, H, W, C] -> float32 NumPy: "features" [N, D]; where the network has them "class_logits"
        [N, K] (of the data's own classes), "logits" [N, 1008] (of the Inception Score), "spatial" [N, 2023].
      kind: of NETWORKS. levels: grey levels that it takes. resize: what it does to images, in words.
      fitted: trained here, small: nothing that it says is worth keeping for another run. accuracy: then, in words, on
        images that it was not fitted on.
    """

    name: str
    digest: str
    metric: str
    scale: float
    apply: Callable[[np.ndarray], Vectors]
    kind: str = "main"
    levels: int = 256
    resize: str = "none"
    fitted: bool = False
    accuracy: str | None = None

    @property
    def chunk(self) -> int:
        """Images that are put through at a time where they are read from a set."""
        return 4096 if self.fitted else 256

    def named(self, num: int) -> str:
        """The metric's name for `num` images (`records.named`)."""
        return named(self.metric, num)


def batched(program: Callable, batch: int) -> Callable[[np.ndarray], Vectors]:
    """Run a jitted program over images in padded batches of one size, over all devices."""
    mesh = sharding.make_mesh()
    batch = -(-batch // mesh.size) * mesh.size
    own = sharding.own_rows(batch)

    def apply(images: np.ndarray) -> Vectors:
        parts = []
        for i in range(0, len(images), batch):
            rows = images[i : i + batch]
            padded = np.concatenate([rows, np.zeros((batch - len(rows), *rows.shape[1:]), rows.dtype)])
            out = program(sharding.put_batch(mesh, padded[own]))
            parts.append({k: sharding.to_host(v)[: len(rows)] for k, v in out.items()})
        return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}

    return apply


def _rgb(images: np.ndarray) -> np.ndarray:
    """One grey channel is repeated to three (specs/edm.md section 14.3)."""
    return np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images


def _as_shape(images: np.ndarray, shape: tuple[int, ...], name: str) -> np.ndarray:
    """Images as the classifier takes them: one channel of grey ones that a file holds in three, as the .npz for
    OpenAI's evaluator does.

    Raises:
      UserError: colours where it knows grey, or another size than `shape`.
    """
    allowed = {shape[2], 3} if shape[2] == 1 else {shape[2]}
    if images.shape[1:3] != shape[:2] or images.shape[3] not in allowed:
        sizes = ["x".join(map(str, s)) for s in (shape, images.shape[1:])]
        raise UserError(f"{name}: takes images of {sizes[0]}, and these have {sizes[1]}; set --network")
    if images.shape[3] == shape[2]:
        return images
    if not (images == images[..., :1]).all():
        raise UserError(f"{name}: takes grey images, and these have colours; set --network")
    return images[..., :1]


def _weights(name: str, weights: str | None) -> tuple[convert.Released, str]:
    """(what the file holds, twelve hex digits of its SHA-256) of a feature network's file."""
    path = names.resolve(weights or DEFAULT_WEIGHTS[name])
    try:
        released = convert.read(path)
    except UnsafeOrDamaged as e:
        raise UserError(str(e)) from None
    if released.kind != name:
        raise UserError(f"{path}: holds {released.kind or 'another network'}; expected the weights of {name}")
    return released, files.digest(path)


def _converted(released: convert.Released) -> Any:
    try:
        return convert.from_torch(released.kind or "", released.config, released.state_dict)
    except ValueError as e:
        raise UserError(f"weights of {released.kind}: {e}") from None


def _inception(weights: str | None) -> FeatureNet:
    from ddo_jax.models import inception

    released, digest = _weights("inception", weights)
    _, variables = _converted(released)
    variables = jax.device_put(variables)

    def program(images: Any) -> dict[str, jax.Array]:
        out = inception.features(variables, images)
        return {"features": out["pool3"], "logits": out["logits_unbiased"], "spatial": out["spatial"]}

    # XLA's CPU backend is twice as fast on small batches (benchmarks/metrics.py: 13 against 7 images/s), and smaller
    apply = batched(jax.jit(program), batch=8 if jax.default_backend() == "cpu" else 64)
    return FeatureNet(
        "FID-Inception, pool3",
        digest,
        "fid",
        1.0,
        lambda images: apply(_rgb(images)),
        kind="inception",
        resize="TF1 bilinear 299, (x - 128) / 128",
    )


def _dinov2(weights: str | None) -> FeatureNet:
    from ddo_jax.models import dinov2

    released, digest = _weights("dinov2", weights)
    module, variables = _converted(released)
    variables = jax.device_put(variables)
    apply = batched(jax.jit(lambda images: {"features": dinov2.features(module, variables, images)}), batch=32)
    return FeatureNet(
        "DINOv2 ViT, class token",
        digest,
        "fd_dinov2",
        1.0,
        lambda images: apply(_rgb(images)),
        kind="dinov2",
        resize="bicubic antialiased 224, float",
    )


def _efficientnet(weights: str | None) -> FeatureNet:
    from ddo_jax.models import efficientnet

    released, digest = _weights("efficientnet", weights)
    _, variables = _converted(released)
    variables = jax.device_put(variables)
    apply = batched(jax.jit(lambda images: {"features": efficientnet.features(variables, images)}), batch=64)
    return FeatureNet(
        "EfficientNet-Lite0, pooled",
        digest,
        "fd_efficientnet",
        1.0,
        lambda images: apply(_rgb(images)),
        kind="efficientnet",
        resize="bicubic antialiased to a multiple of 32 within 64 and 224, float, (x - 127) / 128",
    )


@dataclasses.dataclass(frozen=True)
class Fit:
    """What a classifier is fitted on, and where it is kept.

    Attributes:
      train: source of the training split. holdout: of images that tell its accuracy; None: every tenth of `train`, left
        out of the fitting. levels: grey levels. path: its file. expected: its digest, where a run has begun with it.
    """

    train: Any
    holdout: Any
    levels: int
    path: epath.Path
    expected: str | None = None

    @property
    def design(self) -> classifier.Design:
        return classifier.Design(tuple(self.train.image_shape), self.levels, self.train.num_classes)

    def layers(self) -> Any:
        """Fitted now; deterministic on one device."""
        real = self.train.read(classifier.rows_to_fit(len(self.train), self.holdout is not None))
        return classifier.train(real["image"], real["label"], self.design).layers

    def accuracy(self, layers: Any) -> str:
        """Its accuracy, in words."""
        if self.holdout is not None:
            source, name, rows = self.holdout, self.holdout.name, np.arange(len(self.holdout))
        else:
            source, name, rows = self.train, "every tenth training image", classifier.left_out(len(self.train))
        if not len(rows):
            return "not known: fewer than ten images"
        real = source.read(classifier.evenly(rows, classifier.MOST_JUDGED))
        value = classifier.accuracy(layers, real["image"], real["label"], self.design)
        return f"{value:.3f} on {len(real['image'])} images ({name})"


def _kept(fit: Fit) -> tuple[Any, str]:
    """(layers of the classifier's file or None, what is wrong with it)."""
    content = files.kept(fit.path)
    if content is None:
        return None, ""
    try:
        layers, _ = classifier.of_file(content, fit.design)
    except (ValueError, KeyError) as e:
        return None, f"damaged ({e})"
    if fit.expected not in (None, classifier.Classifier(layers).digest):
        return None, "not the network that this run is judged by"
    return layers, ""


def _fitted(fit: Fit) -> Any:
    """The layers of the classifier: those of its file, or, where this is damaged or another one, made again.

    Raises:
      UserError: made again, it is not the one that the run began with.
    """
    layers, problem = _kept(fit)
    if layers is not None:
        return layers
    if problem:
        print(f"warning: {fit.path}: {problem}: made again", file=sys.stderr)
    layers = fit.layers()
    now = classifier.Classifier(layers).digest
    if fit.expected not in (None, now):
        raise UserError(
            f"{fit.path}: {problem or 'missing'}, and made again on this device it is another network "
            f"({fit.expected} -> {now}): scores could not be compared; put back a copy of the file, or take another "
            "--workdir"
        )
    files.keep(fit.path, classifier.to_file(layers, fit.design), f"the classifier of {fit.train.name}")
    return layers


def check_fit(train: Any, levels: int) -> None:
    """Refuse data for which there is no classifier.

    Raises:
      UserError: no labels, or images of a size that it does not take.
    """
    if problem := classifier.Design(tuple(train.image_shape), levels, train.num_classes).problem():
        raise UserError(
            f"config.eval.network: a classifier of {train.name}: {problem}; set inception, dinov2, efficientnet or none"
        )


def _classifier(kind: str, fit: Fit) -> FeatureNet:
    check_fit(fit.train, fit.levels)
    layers = _fitted(fit)
    return _network(kind, layers, fit.design, fit.accuracy(layers))


def _kept_classifier(weights: str | None) -> FeatureNet:
    """Of the file that a run left."""
    if weights is None:
        raise UserError("--network=classifier: of a run: --weights=WORKDIR/features-classifier.npz")
    path = names.resolve(weights)
    try:
        layers, design = classifier.of_file(epath.Path(path).read_bytes())
    except (OSError, ValueError, KeyError) as e:
        raise UserError(f"{path}: no classifier of a run ({e}); its workdir has one: features-classifier.npz") from None
    return _network("classifier", layers, design, None)


def _network(kind: str, layers: Any, design: classifier.Design, accuracy: str | None) -> FeatureNet:
    name = f"{'digits ' if kind == 'digits' else ''}classifier, {design.features} features"

    def apply(images: np.ndarray) -> Vectors:
        taken = _as_shape(images, design.shape, name)
        features, logits = classifier.features_and_logits(layers, taken, design)
        return {"features": np.asarray(features), "class_logits": np.asarray(logits)}

    return FeatureNet(
        name,
        classifier.Classifier(layers).digest,
        "fd_x100",
        100.0,
        apply,
        kind=kind,
        levels=design.levels,
        resize="none" if design.factor == 1 else f"mean of {design.factor} x {design.factor}",
        fitted=True,
        accuracy=accuracy,
    )


RELEASED = {"inception": _inception, "dinov2": _dinov2, "efficientnet": _efficientnet}
FITTED = ("digits", "classifier")
NETWORKS = (*FITTED, *RELEASED)
DEFAULT_WEIGHTS = {"inception": "inception-2015-12-05", "dinov2": "dinov2-vitl14"}
DEFAULT_WEIGHTS |= {"efficientnet": "efficientnet-lite0"}


def file_of(name: str, weights: str | None) -> str | None:
    """The local file of a network's weights; None for a network that is fitted here.

    Raises:
      UserError: not at hand.
    """
    return names.resolve(weights or DEFAULT_WEIGHTS[name]) if name in DEFAULT_WEIGHTS else None


def check(name: str, weights: str | None) -> None:
    """Refuse an unknown network, or one whose weights are not at hand, before anything else happens.

    Raises:
      UserError: names the file to fetch and where to put it.
    """
    if name not in NETWORKS:
        raise UserError(f"config.eval.network: {name!r}; allowed: {', '.join(NETWORKS)}, none")
    file_of(name, weights)


def get_features(name: str, fit: Fit | None = None, weights: str | None = None) -> FeatureNet:
    """The feature network `name`.

    Args:
      name: of NETWORKS. fit: of those of FITTED; None: the classifier that a run left in the file `weights`.
      weights: WHAT of the network's file; None: its known name.

    Raises:
      UserError: unknown name, or weights that are absent or do not fit.
    """
    check(name, weights)
    if name not in FITTED:
        return RELEASED[name](weights)
    return _kept_classifier(weights) if fit is None else _classifier(name, fit)
