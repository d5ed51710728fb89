"""FID-Inception files (specs/metrics.md section 4) <-> variables of `ddo_jax.models.inception`.

Four namings, told apart by the names themselves; "torch" is the one that we write:

    naming  4.x  convolution                      gamma, beta, mean, var                               head
    torch   1    <layer>.conv.weight   [O,I,H,W]  <layer>.bn.{weight,bias,running_mean,running_var}    fc.*
    tf      2    <scope>/conv2d_params [H,W,I,O]  <scope>/batchnorm/{gamma,beta,moving_mean,...}       softmax/*
    nvidia  3    layers.<path>.weight  [O,I,H,W]  layers.<path>.{beta,mean,var}; no gamma              output.*
    mixed   3    layers.<path>.conv.weight        layers.<path>.bn.* as in torch                       output.*
    ours         params/<layer>/weight [H,W,I,O]  params/<layer>/{gamma,beta,mean,var}                 params/fc/*

Head weights are [1008, 2048], in tf and ours [2048, 1008]. A naming without gamma, or a file that leaves all of it
out, means ones: TensorFlow's op does not scale. Coverage is exact in both directions.
"""

import functools

import flax.traverse_util
import jax
import numpy as np

from ddo_jax.models import inception

NAMINGS = ("torch", "nvidia", "tf", "mixed")
LEAVES = ("weight", "gamma", "beta", "mean", "var")

# Scopes of the TensorFlow graph, in the order of the branches in inception.BLOCKS (section 4.3)
_SCOPES = {
    "A": "conv tower/conv tower/conv_1 tower_1/conv tower_1/conv_1 tower_1/conv_2 tower_2/conv",
    "B": "conv tower/conv tower/conv_1 tower/conv_2",
    "C": "conv tower/conv tower/conv_1 tower/conv_2 tower_1/conv tower_1/conv_1 tower_1/conv_2 tower_1/conv_3"
    " tower_1/conv_4 tower_2/conv",
    "D": "tower/conv tower/conv_1 tower_1/conv tower_1/conv_1 tower_1/conv_2 tower_1/conv_3",
    "E": "conv tower/conv tower/mixed/conv tower/mixed/conv_1 tower_1/conv tower_1/conv_1 tower_1/mixed/conv"
    " tower_1/mixed/conv_1 tower_2/conv",
}
_LEAVES = {
    "torch": ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"),
    "tf": (
        "conv2d_params",
        *(f"batchnorm/{name}" for name in ("gamma", "beta", "moving_mean", "moving_variance")),
    ),
    "nvidia": ("weight", None, "beta", "mean", "var"),
}
_LEAVES["mixed"] = _LEAVES["torch"]
_HEADS = {
    "torch": ("fc.weight", "fc.bias"),
    "tf": ("softmax/weights", "softmax/biases"),
    "nvidia": ("output.weight", "output.bias"),
    "mixed": ("output.weight", "output.bias"),
}


def _scopes() -> list[tuple[str, str]]:
    """(scope of the TF graph, NVIDIA path) of every convolution, in the order of `inception.layer_names`."""
    kinds = [kind for _, kind, *_ in inception.STAGES if kind in inception.BLOCKS]
    stem = len(inception.layer_names()) - sum(len(_SCOPES[kind].split()) for kind in kinds)
    scopes = [f"conv_{i}" if i else "conv" for i in range(stem)]
    pairs = [(scope, f"layers.{scope}") for scope in scopes]
    for i, kind in enumerate(kinds):
        block = f"mixed_{i}" if i else "mixed"
        joint = "_" if kind == "E" else "."
        pairs += [(f"{block}/{s}", f"layers.{block}.{s.replace('/', joint)}") for s in _SCOPES[kind].split()]
    return pairs


def _paths() -> list[tuple]:
    """Paths of all 472 arrays in our variables, in the order of the torch file."""
    paths = [("params", *layer.split("."), leaf) for layer in inception.layer_names() for leaf in LEAVES]
    return [*paths, ("params", "fc", "weight"), ("params", "fc", "bias")]


@functools.cache
def _shapes() -> dict[tuple, tuple[int, ...]]:
    """{path in our variables: shape}; allocates nothing."""
    x = jax.ShapeDtypeStruct((1, inception.SIZE, inception.SIZE, 3), np.float32)
    abstract = jax.eval_shape(inception.Inception().init, jax.random.key(0), x)
    shapes = flax.traverse_util.flatten_dict({"params": abstract["params"]})
    return {path: shapes[path].shape for path in _paths()}


def _axes(naming: str, ndim: int) -> tuple[int, ...]:
    """Transposition from our layout to a file's."""
    return tuple(range(ndim)) if naming == "tf" else {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[ndim]


def _naming(config: dict) -> str | None:
    """The one option that there is; the network itself has none."""
    if unknown := config.keys() - {"naming"}:
        raise ValueError(f"config of FID-Inception: unknown key {min(unknown)!r}; allowed: 'naming'")
    return config.get("naming")


@functools.cache
def names(naming: str = "torch") -> dict[str, tuple[tuple, tuple[int, ...]]]:
    """{name in the file: (path in our variables, shape in the file)}, in the order of section 4.1.

    Raises:
      ValueError: unknown naming.
    """
    if naming not in NAMINGS:
        raise ValueError(f"naming is {naming!r}; allowed: {', '.join(NAMINGS)}")
    layers = inception.layer_names()
    if naming != "torch":
        layers = [pair[naming != "tf"] for pair in _scopes()]
    separator = "/" if naming == "tf" else "."
    in_file = [leaf and layer + separator + leaf for layer in layers for leaf in _LEAVES[naming]]
    found = {}
    for name, (path, shape) in zip([*in_file, *_HEADS[naming]], _shapes().items(), strict=True):
        if name:
            found[name] = path, tuple(shape[i] for i in _axes(naming, len(shape)))
    return found


def layout(config: dict):
    """(module, {name in the file: shape}) in the order of the torch file; allocates nothing."""
    return inception.Inception(), {name: shape for name, (_, shape) in names(_naming(config) or "torch").items()}


def detect(state_dict: dict) -> str:
    """The naming of a file; one whose names nobody knows is refused."""
    hits = {naming: len(names(naming).keys() & state_dict.keys()) for naming in NAMINGS}
    best = max(NAMINGS, key=hits.get)
    if not hits[best]:
        first = next(iter(state_dict), None)
        raise ValueError(f"no FID-Inception: none of its {len(state_dict)} names is known, the first is {first!r}")
    return best


def _check(shapes: dict, expected: dict, optional: set, whose: str):
    """One line for the first name that is missing, unknown or of another shape."""
    for name, shape in expected.items():
        if name not in shapes and name not in optional:
            raise ValueError(f"{name}: missing; expected shape {list(shape)}")
        if shapes.get(name, shape) != shape:
            raise ValueError(f"{name}: shape {list(shapes[name])}; expected {list(shape)}")
    if unknown := [name for name in shapes if name not in expected]:
        raise ValueError(f"{unknown[0]}: shape {list(shapes[unknown[0]])}; {whose} has no such parameter")


def from_torch(config: dict, state_dict: dict):
    """(Inception, variables) of a file in any of the four namings; contiguous NumPy arrays of unchanged dtype.

    Args:
      config: {}, or {"naming": one of NAMINGS} to insist on one. state_dict: {name: array};
        `num_batches_tracked` is passed over.

    Raises:
      ValueError: as `ddo_jax.convert.from_torch`; or gamma is there for some layers only.
    """
    state = {name: np.asarray(v) for name, v in state_dict.items() if not name.endswith(".num_batches_tracked")}
    naming = _naming(config) or detect(state)
    known = names(naming)
    gammas = {name for name, (path, _) in known.items() if path[-1] == "gamma"}
    optional = gammas if gammas.isdisjoint(state) else set()
    expected = {name: shape for name, (_, shape) in known.items()}
    _check({name: v.shape for name, v in state.items()}, expected, optional, f"naming {naming!r}")
    flat = {}
    for name in state.keys() & known.keys():
        path, _ = known[name]
        flat[path] = np.ascontiguousarray(state[name].transpose(np.argsort(_axes(naming, state[name].ndim))))
    for path, shape in _shapes().items():
        flat.setdefault(path, np.ones(shape, np.float32))  # only gamma can be missing here
    return inception.Inception(), flax.traverse_util.unflatten_dict({path: flat[path] for path in _shapes()})


def to_torch(config: dict, variables: dict) -> dict:
    """{name: contiguous NumPy array} in the order of the file; the inverse of `from_torch`.

    Args:
      config: {}, or {"naming": one of NAMINGS}; the default is "torch". variables: of `from_torch`.

    Raises:
      ValueError: as `ddo_jax.convert.to_torch`; or the naming has no gamma and ours is not 1.
    """
    naming = _naming(config) or "torch"
    flat = flax.traverse_util.flatten_dict(dict(variables))
    flat = {path: np.asarray(v) for path, v in flat.items()}
    slashed = {"/".join(path): v.shape for path, v in flat.items()}
    _check(slashed, {"/".join(path): shape for path, shape in _shapes().items()}, set(), "FID-Inception")
    known = names(naming)
    stored = {path for path, _ in known.values()}
    for path in _shapes():
        if path not in stored and (flat[path] != 1).any():
            raise ValueError(f"{'/'.join(path)}: not 1; naming {naming!r} has no place for it")
    return {
        name: np.ascontiguousarray(flat[path].transpose(_axes(naming, flat[path].ndim)))
        for name, (path, _) in known.items()
    }
