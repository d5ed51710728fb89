"""Builds files as the released ones are, without torch and without the original code (specs/edm.md 16.6)."""

import io
import json
import pickle
import struct
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest

GOLDENS = Path(__file__).parents[1] / "goldens"
MAGIC = 0x1950A86A20F9469CFC6C
STORAGE = {"f4": "FloatStorage", "f8": "DoubleStorage", "f2": "HalfStorage", "i8": "LongStorage", "b1": "BoolStorage"}
FILES = [f"edm_{name}_small" for name in ("ddpmpp", "ncsnpp", "ncsnpp_release", "song_skip", "adm")]


def golden(name):
    """(config, state dict) of a golden file."""
    with np.load(GOLDENS / f"{name}.npz") as f:
        state = {k.removeprefix("param/"): f[k] for k in f.files if k.startswith("param/")}
        return json.loads(str(f["config"])), state


class Call:
    """Pickles as REDUCE of `function` with `args`."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


DUMMIES = {}


def dummy(module, name, kind="function", base=object):
    """A global of that name in a module of ours, which sys.modules holds while we pickle."""
    if kind == "class":
        value = type(name, (base,), {"__module__": module})
    else:
        value = types.FunctionType((lambda *a: None).__code__, {}, name)
        value.__module__, value.__qualname__ = module, name
    parts = module.split(".")
    for i in range(len(parts)):  # parents first, or the import of `module` fails
        parent = ".".join(parts[: i + 1])
        DUMMIES.setdefault(parent, types.ModuleType(parent))
    setattr(DUMMIES[module], name, value)
    return value


RECONSTRUCT = dummy("torch_utils.persistence", "_reconstruct_persistent_obj")
PARAMETER = dummy("torch._utils", "_rebuild_parameter")
TENSOR = dummy("torch._utils", "_rebuild_tensor_v2")
FROM_BYTES = dummy("torch.storage", "_load_from_bytes")
MODULE_DICT = dummy("torch.nn.modules.container", "ModuleDict", "class")
EASY_DICT = dummy("dnnlib.util", "EasyDict", "class", dict)
STORAGES = {name: dummy("torch", name, "class") for name in [*STORAGE.values(), "BFloat16Storage"]}


class Pickler(pickle.Pickler):
    """A pickler that can name our dummies; `Persistent` objects become persistent ids."""

    def persistent_id(self, obj):
        return obj.pid if type(obj) is Persistent else None


class Persistent:
    def __init__(self, pid):
        self.pid = pid


def dumps(value, protocol=4):
    saved = {name: sys.modules.get(name) for name in DUMMIES}
    sys.modules.update(DUMMIES)
    try:
        buffer = io.BytesIO()
        Pickler(buffer, protocol).dump(value)
        return buffer.getvalue()
    finally:
        for name, module in saved.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def storage_class(array):
    return STORAGES[STORAGE[array.dtype.str[1:]]]


def legacy(value, storages, order=None):
    """The stream of specs/edm.md section 16.4: `value` holds `Persistent` ids; storages {key: array}."""
    info = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    parts = [dumps(v, 2) for v in (MAGIC, 1001, info, value, order or list(storages))]
    return b"".join(parts) + b"".join(struct.pack("<q", a.size) + a.tobytes() for a in storages.values())


def blob(array, key="94273", view=(None,)):
    pid = ("storage", storage_class(array), key, "cpu", array.size, *view)
    return legacy(Persistent(pid), {key: array})


def tensor(array, storage, parameter=True):
    strides = tuple(s // array.itemsize for s in np.empty(array.shape, array.dtype).strides)
    value = Call(TENSOR, storage, 0, array.shape, strides, False, {})
    return Call(PARAMETER, value, False, {}) if parameter else value


def nested_tensor(array, parameter):
    return tensor(array, Call(FROM_BYTES, blob(array)), parameter)


def attributes(parameters, buffers, modules, **rest):
    hooks = {"_backward_hooks": {}, "_forward_hooks": {}}
    groups = {"_parameters": parameters, "_buffers": buffers, "_non_persistent_buffers_set": set()}
    return {"training": False, **groups, **hooks, "_modules": modules, **rest}


def persistent(class_name, state):
    meta = {"type": "class", "version": 6, "module_src": SOURCE, "class_name": class_name, "state": state}
    return Call(RECONSTRUCT, meta)


SOURCE = "raise SystemExit('source text was executed')\n" * 200  # long and hostile; must never matter


def tree(state):
    """{dotted name: array} -> nested dict in file order."""
    root = {}
    for name, array in state.items():
        *path, leaf = name.split(".")
        node = root
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = array
    return root


def module(node, class_name="Layer", **rest):
    """One pickled module of a nested dict; enc and dec are ModuleDicts, everything else persistent."""
    buffers = ("resample_filter", "freqs", "phases")
    leaves = {k: v for k, v in node.items() if not isinstance(v, dict)}
    parameters = {k: nested_tensor(v, True) for k, v in leaves.items() if k not in buffers}
    held = {"resample_filter": None} | {k: nested_tensor(v, False) for k, v in leaves.items() if k in buffers}
    inner = {}
    for name, child in node.items():
        if isinstance(child, dict) and name in ("enc", "dec"):
            inner[name] = container = MODULE_DICT.__new__(MODULE_DICT)
            container.__dict__.update(attributes({}, {}, {k: module(v) for k, v in child.items()}))
        elif isinstance(child, dict):
            inner[name] = module(child)
    return persistent(class_name, attributes(parameters, held, inner, skip_scale=np.float64(0.5), **rest))


INNER = ("in_channels", "out_channels")
OUTER = ("img_resolution", "img_channels", "label_dim", "use_fp16", "sigma_min", "sigma_max", "sigma_data")


def nvidia_network(config, state):
    kwargs = {k: v for k, v in config.items() if k != "class_name"}
    inner = {k: v for k, v in kwargs.items() if k not in ("img_channels", "model_type")}
    inner |= dict.fromkeys(INNER, config["img_channels"])
    network = module(tree(state)["model"], _init_args=(), _init_kwargs=inner)
    outer = attributes({}, {}, {"model": network}, _init_args=(), _init_kwargs=kwargs)
    return persistent("EDMPrecond", outer)


def nvidia(config, state, **others):
    """A training snapshot."""
    return dumps({"ema": nvidia_network(config, state), "loss_fn": None, "augment_pipe": None, **others})


# ----------------------------------------------------------------------------------------------------
# EDM2 (specs/edm2.md section 10)

PRECOND = ("use_fp16", "sigma_data", "logvar_channels")  # arguments that the U-Net inside does not get
SCALE, BIAS = np.float32([0.11990407, 0.10822511, 0.13477089, 0.15243903]), np.float32([-0.69664264, -0.3517316, 0, 1])


def edm2_module(node, class_name, **rest):
    """As `module`, with the classes and attributes of EDM2's networks."""

    def inner(name, child):
        if name in ("enc", "dec"):
            container = MODULE_DICT.__new__(MODULE_DICT)
            container.__dict__.update(attributes({}, {}, {k: inner(k, v) for k, v in child.items()}))
            return container
        if "conv_res0" in child:
            block = edm2_module(child, "Block", out_channels=8, flavor="enc", num_heads=1, resample_filter=[1, 1])
            block.args[0]["state"]["_modules"].setdefault("conv_skip", None)  # registered, but not there
            return block
        return edm2_module(child, "MPFourier" if "freqs" in child else "MPConv", _init_args=(8, 8), _init_kwargs={})

    leaves = {k: v for k, v in node.items() if not isinstance(v, dict)}
    buffers = {k: nested_tensor(v, False) for k, v in leaves.items() if k in ("freqs", "phases")}
    parameters = {k: nested_tensor(v, True) for k, v in leaves.items() if k not in buffers}
    modules = {k: inner(k, v) for k, v in node.items() if isinstance(v, dict)}
    return persistent(class_name, attributes(parameters, buffers, modules, **rest))


def vae_encoder(scale=SCALE, bias=BIAS, class_name="StabilityVAEEncoder"):
    state = {"vae_name": "stabilityai/sd-vae-ft-mse", "scale": scale, "bias": bias, "batch_size": 8, "_vae": None}
    return persistent(class_name, state | {"_init_args": (), "_init_kwargs": {}})


def edm2_network(config, state):
    kwargs = {k: v for k, v in config.items() if k != "class_name"}
    inner = {k: v for k, v in kwargs.items() if k not in PRECOND}
    nodes = tree(state)
    network = edm2_module(nodes, "Precond", _init_args=(), _init_kwargs=EASY_DICT(kwargs))
    unet = edm2_module(nodes["unet"], "UNet", _init_args=(), _init_kwargs=inner)
    network.args[0]["state"]["_modules"]["unet"] = unet
    return network


def edm2_nvidia(config, state, encoder=None, **others):
    """A snapshot: EasyDict(encoder, dataset_kwargs, loss_fn, ema)."""
    loss = persistent("EDM2Loss", {"P_mean": -0.4, "P_std": 1.0, "sigma_data": 0.5})
    top = {"encoder": encoder, "dataset_kwargs": EASY_DICT(path="x.zip"), "loss_fn": loss}
    return dumps(EASY_DICT(top, ema=edm2_network(config, state), **others))


def half(state):
    """As released: everything float16, gains and buffers too."""
    return {k: v.astype(np.float16) for k, v in state.items()}


# ----------------------------------------------------------------------------------------------------
# torch.save


def torch_run(states, **rest):
    """torch.save of several state dicts and of what else a trainer keeps."""
    flat = {f"{key} {name}": array for key, state in states.items() for name, array in state.items()}

    def nest(value):
        return {key: {name: value[f"{key} {name}"] for name in state} for key, state in states.items()} | rest

    return torch_zip(flat, nest=nest)


def torch_zip(state, top="archive", byteorder=None, compress=zipfile.ZIP_STORED, nest=lambda v: v):
    """torch.save of a state dict since 1.6."""
    value, members = {}, {}
    for i, (name, array) in enumerate(state.items()):
        pid = ("storage", storage_class(array), str(i), "cpu", array.size)
        value[name] = tensor(array, Persistent(pid), parameter=False)
        members[f"data/{i}"] = array.astype(array.dtype.newbyteorder(">" if byteorder == "big" else "<")).tobytes()
    members = {"data.pkl": dumps(nest(value), 2), **members}
    if byteorder:
        members["byteorder"] = byteorder.encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compress) as f:
        for name, data in members.items():
            f.writestr(f"{top}/{name}", data)
    return buffer.getvalue()


def torch_legacy(state):
    """torch.save of a state dict before 1.6."""
    value = {}
    for i, (name, array) in enumerate(state.items()):
        pid = ("storage", storage_class(array), str(i), "cpu", array.size, None)
        value[name] = tensor(array, Persistent(pid), parameter=False)
    return legacy(value, {str(i): array for i, array in enumerate(state.values())})


@pytest.fixture(scope="session")
def small():
    """(config, state dict) of a thousand numbers with the names of EDM, enough for `read` to recognise it."""
    rng = np.random.default_rng(0)
    m, layer = 4, {}
    block = {"norm0": (m,), "conv0": (m, m, 3, 3), "affine": (m, 4 * m), "norm1": (m,), "conv1": (m, m, 1, 1)}
    for at, shape in {
        "map_layer0": (4 * m, m),
        "map_layer1": (4 * m, 4 * m),
        "enc.8x8_conv": (m, 3, 3, 3),
        **{f"enc.8x8_block0.{k}": v for k, v in block.items()},
        "dec.8x8_aux_norm": (m,),
        "dec.8x8_aux_conv": (3, m, 3, 3),
    }.items():
        layer[f"model.{at}.weight"] = rng.standard_normal(shape).astype(np.float32)
        layer[f"model.{at}.bias"] = rng.standard_normal(shape[0]).astype(np.float32)
    config = {"model_type": "SongUNet", "img_resolution": 8, "img_channels": 3, "label_dim": 0}
    return config | {"model_channels": m, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}, layer


@pytest.fixture(scope="session")
def small_edm2():
    """(config, float16 state dict) of a thousand numbers with the names of EDM2: one level, one channel, no heads."""
    config = {"img_resolution": 4, "img_channels": 1, "label_dim": 2, "model_channels": 2, "channel_mult": [1]}
    config |= {"num_blocks": 0, "attn_resolutions": [4], "channels_per_head": 2, "logvar_channels": 3}
    block = {"conv_res0": (2, 2, 3, 3), "emb_linear": (2, 2), "conv_res1": (2, 2, 3, 3)}
    attention = {"attn_qkv": (6, 2, 1, 1), "attn_proj": (2, 2, 1, 1)}
    after_cat = {"conv_res0": (2, 4, 3, 3), "emb_linear": (2, 2), "conv_res1": (2, 2, 3, 3), "conv_skip": (2, 4, 1, 1)}
    shapes = {"unet.out_gain": (), "unet.emb_fourier.freqs": (2,), "unet.emb_fourier.phases": (2,)}
    shapes |= {
        "unet.emb_noise.weight": (2, 2),
        "unet.emb_label.weight": (2, 2),
        "unet.enc.4x4_conv.weight": (2, 2, 3, 3),
    }
    for at, layers in {"in0": block | attention, "in1": block, "block0": after_cat | attention}.items():
        shapes[f"unet.dec.4x4_{at}.emb_gain"] = ()
        shapes |= {f"unet.dec.4x4_{at}.{name}.weight": shape for name, shape in layers.items()}
    shapes |= {"unet.out_conv.weight": (1, 2, 3, 3), "logvar_fourier.freqs": (3,), "logvar_fourier.phases": (3,)}
    shapes |= {"logvar_linear.weight": (1, 3)}
    rng = np.random.default_rng(0)
    return config, {k: np.asarray(rng.standard_normal(v)).astype(np.float16) for k, v in shapes.items()}
