"""Names and shapes of a state dict -> what network it is and its constructor arguments.

    kind_of(state)                                             # by the names that only one kind has
    infer_edm(state), infer_edm2(state), infer_dinov2(state)   # arguments from the arrays alone
    edm_config(recorded, state), edm2_config(recorded, state)  # as recorded, completed and checked by the arrays

Nothing is allocated: `state` may hold anything with a shape. Sources: specs/edm.md sections 6, 7, 16.2;
specs/edm2.md sections 3-7, 13; specs/var.md section 6.
"""

import math
import re

import numpy as np

from ddo_jax.convert.inert import UnsafeOrDamaged, show

# First convolution of FID-Inception in each of its namings (specs/metrics.md section 4)
INCEPTION = {
    "Conv2d_1a_3x3.conv.weight": "torch",
    "conv/conv2d_params": "tf",
    "layers.conv.weight": "nvidia",
    "layers.conv.conv.weight": "mixed",
}
# In every state dict of the kind and in none of its relatives: diffusers' autoencoders call their blocks otherwise than
# the original Stable Diffusion's and VAR's, and of these two only VAR's counts the use of its codes by scale.
_ALWAYS = {
    "dinov2": ("blocks.0.ls1.gamma", "patch_embed.proj.weight"),
    "edm": ("model.map_layer0.weight",),
    "edm2": ("unet.emb_noise.weight",),
    "efficientnet": ("_conv_stem.weight", "_blocks.15._project_conv.weight", "_conv_head.weight", "_fc.weight"),
    "mlp": ("net.map_layer0.weight", "net.input.weight", "net.output.weight"),
    "sdvae": (
        *("encoder.conv_in.weight", "encoder.mid_block.resnets.0.conv1.weight", "decoder.conv_in.weight"),
        *("quant_conv.weight", "post_quant_conv.weight"),
    ),
    "sit": ("x_embedder.proj.weight", "t_embedder.mlp.0.weight", "y_embedder.embedding_table.weight", "pos_embed"),
    "var": ("pos_start", "pos_1LC", "word_embed.weight", "class_emb.weight", "lvl_embed.weight", "head.weight"),
    "vqvae": (
        *("encoder.conv_in.weight", "encoder.mid.block_1.conv1.weight", "decoder.conv_in.weight"),
        *("quantize.ema_vocab_hit_SV", "quantize.embedding.weight", "quant_conv.weight", "post_quant_conv.weight"),
    ),
}
_FIRST = {
    "edm": re.compile(r"model\.enc\.(\d+)x(\d+)_conv\.weight"),
    "edm2": re.compile(r"unet\.enc\.(\d+)x\1_conv\.weight"),
}


def kind_of(state: dict) -> str | None:
    """The kind whose names these are; None: of no kind that can be converted."""
    if any(name in state for name in INCEPTION):
        return "inception"
    for kind, names in _ALWAYS.items():
        first = _FIRST.get(kind)
        if all(name in state for name in names) and (first is None or any(map(first.fullmatch, state))):
            return kind
    return None


def infer_dinov2(state: dict) -> dict:
    """Arguments of DINOv2 from the shapes; heads are 64 wide in all released sizes.

    Raises:
      UnsafeOrDamaged: an array that tells a size is missing.
    """
    try:
        width, patch = state["cls_token"].shape[-1], state["patch_embed.proj.weight"].shape[-1]
        side = math.isqrt(max(state["pos_embed"].shape[1] - 1, 0)) * patch
    except (KeyError, IndexError) as e:
        raise UnsafeOrDamaged(f"DINOv2: {e.args[0]}: missing, or not of its shape") from None
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    return {"embed_dim": width, "depth": depth, "num_heads": width // 64, "patch_size": patch, "img_size": side}


# ----------------------------------------------------------------------------------------------------
# What EDM and EDM2 have in common


def _shown_by(infer, family: str, state: dict, *args) -> dict:
    """infer({name: shape}), with one error for whatever is wrong with the names."""
    try:
        return infer({k: np.shape(v) for k, v in state.items()}, *args)
    except (KeyError, IndexError, ValueError, ZeroDivisionError, StopIteration) as e:
        what = show(str(e))
        raise UnsafeOrDamaged(f"names of an {family} network, but no network has these shapes ({what})") from None


def _levels_and_blocks(resolution: int, matches: list) -> tuple[list, int]:
    """(resolutions, blocks a level) of the names {resolution}...block{index}."""
    levels = sorted({int(m[1]) for m in matches}, reverse=True)
    if levels != [resolution >> i for i in range(len(levels))] or not 1 <= levels[-1] <= resolution <= 4096:
        raise ValueError("resolutions do not halve from level to level")
    indices = {int(m[2]) for m in matches}
    if indices != set(range(len(indices))):  # also keeps num_blocks, and with it later work, below the file's size
        raise ValueError("blocks are not numbered 0, 1, 2 ...")
    return levels, len(indices)


def _ratio(a: int, b: int) -> int:
    if a < 1 or a % b:
        raise ValueError(f"{a} channels are no multiple of {b}")
    return a // b


def _check_numbers(recorded: dict, keys):
    for key in keys:
        value = recorded.get(key, 0)
        if not (type(value) is int and abs(value) < 2**63 or type(value) is float and not math.isnan(value)):
            raise UnsafeOrDamaged(f"{key} is recorded as {show(repr(value))}; expected a number")


def _completed(recorded: dict, inferred: dict, defaults: dict, narrowest: int) -> dict:
    """`recorded` with what it leaves out, unless that is the default anyway.

    Args:
      narrowest: channels below which listed resolutions have no attention.

    Raises:
      UnsafeOrDamaged: a recorded argument contradicts the parameters.
    """
    config = dict(recorded)
    for key, seen in inferred.items():
        if key == "attn_resolutions" and key in recorded:
            _check_attention(recorded[key], inferred, narrowest)
        elif key in recorded and recorded[key] != seen:
            value = show(repr(recorded[key]))
            raise UnsafeOrDamaged(f"{key} is recorded as {value}, but the parameters have {seen!r}")
        elif key in recorded:
            config[key] = seen  # 16 for 16.0: sizes are integers from here on
        elif defaults.get(key) != seen:
            config[key] = seen  # also num_blocks and attn_resolutions, which EDM's files never record
    return config


def _check_attention(recorded, inferred: dict, narrowest: int):
    """Listed resolutions that do not occur, or have too few channels for a head, are harmless."""
    base, seen = inferred["model_channels"], inferred["attn_resolutions"]
    sizes = [inferred["img_resolution"] >> i for i in range(len(inferred["channel_mult"]))]
    widths = dict(zip(sizes, inferred["channel_mult"], strict=True))
    if type(recorded) is not list:
        raise UnsafeOrDamaged("attn_resolutions is recorded as something else than a list")
    expected = [r for r in sizes if r in recorded and base * widths[r] >= narrowest]
    if expected != seen:
        value = show(repr(recorded))
        raise UnsafeOrDamaged(f"attn_resolutions is recorded as {value}, but the parameters have {seen}")


# ----------------------------------------------------------------------------------------------------
# EDM

_DEFAULTS = {  # specs/edm.md section 6; what a file leaves out has these values
    "class_name": "EDMPrecond",
    "model_type": "DhariwalUNet",
    "label_dim": 0,
    "augment_dim": 0,
    "channel_mult_emb": 4,
}
_DEFAULTS_SONG = _DEFAULTS | {
    "model_channels": 128,
    "channel_mult": [1, 2, 2, 2],
    "embedding_type": "positional",
    "channel_mult_noise": 1,
    "encoder_type": "standard",
    "decoder_type": "standard",
    "resample_filter": [1, 1],
}
_DEFAULTS_ADM = _DEFAULTS | {"model_channels": 192, "channel_mult": [1, 2, 3, 4]}
_TAPS = {2: [1, 1], 4: [1, 3, 3, 1]}


def infer_edm(state: dict) -> dict:
    """Constructor arguments of the network whose released names and shapes these are.

    What one resolution cannot show (the filter, the wiring of one level) and dropout are left out.

    Raises:
      UnsafeOrDamaged: names that look like EDM, but do not make a network.
    """
    return _shown_by(_infer_edm, "EDM", state)


def _infer_edm(shapes: dict) -> dict:
    adm = "model.out_norm.weight" in shapes
    first = next(m for m in map(_FIRST["edm"].fullmatch, shapes) if m)
    resolution, (width, channels, _, _) = int(first[1]), shapes[first[0]]
    emb, noise = shapes["model.map_layer0.weight"]
    base = noise if adm else width
    if base == 0:
        raise ValueError("no channels")
    blocks = [re.fullmatch(r"model\.enc\.(\d+)x\1_block(\d+)\.conv0\.weight", name) for name in shapes]
    levels, num_blocks = _levels_and_blocks(resolution, [m for m in blocks if m])
    at = "model.enc.{0}x{0}_block0.conv0.weight"
    config = {
        "class_name": "EDMPrecond",
        "model_type": "DhariwalUNet" if adm else "SongUNet",
        "img_resolution": resolution,
        "img_channels": channels,
        "label_dim": shapes.get("model.map_label.weight", (0, 0))[1],
        "augment_dim": shapes.get("model.map_augment.weight", (0, 0))[1],
        "model_channels": base,
        "channel_mult": [_ratio(shapes[at.format(r)][0], base) for r in levels],
        "channel_mult_emb": _ratio(emb, base),
        "num_blocks": num_blocks,
        "attn_resolutions": [r for r in levels if f"model.enc.{r}x{r}_block0.qkv.weight" in shapes],
    }
    return config if adm else config | _infer_song(shapes, levels, _ratio(noise, base))


def _infer_song(shapes: dict, levels: list, channel_mult_noise: int) -> dict:
    config = {
        "embedding_type": "fourier" if "model.map_noise.freqs" in shapes else "positional",
        "channel_mult_noise": channel_mult_noise,
    }
    if len(levels) > 1:  # one level has neither resampling nor auxiliary branches
        r, low = levels[0], levels[-1]
        aux = {name for name in ("residual", "skip") if f"model.enc.{low}x{low}_aux_{name}.weight" in shapes}
        config["encoder_type"] = min(aux, default="standard")
        config["decoder_type"] = "skip" if f"model.dec.{r}x{r}_aux_up.resample_filter" in shapes else "standard"
        config["resample_filter"] = _TAPS[shapes[f"model.dec.{r}x{r}_up.conv0.resample_filter"][-1]]
    return config


def edm_config(recorded: dict, state: dict) -> dict:
    """`recorded` completed from the shapes, with which it must agree; all of it inferred if nothing is recorded.

    Raises:
      UnsafeOrDamaged: a recorded argument contradicts the parameters.
    """
    inferred = infer_edm(state)
    if not recorded:
        return inferred
    _check_numbers(recorded, ("dropout", "label_dropout", "sigma_data", "sigma_min", "sigma_max"))
    adm = inferred["model_type"] == "DhariwalUNet"
    return _completed(recorded, inferred, _DEFAULTS_ADM if adm else _DEFAULTS_SONG, narrowest=64 if adm else 0)


# ----------------------------------------------------------------------------------------------------
# EDM2

DEFAULTS_EDM2 = {  # specs/edm2.md sections 3-5; what a file leaves out has these values
    "class_name": "Precond",
    "model_channels": 192,
    "channel_mult": [1, 2, 3, 4],
    "channel_mult_noise": None,
    "channel_mult_emb": None,
    "num_blocks": 3,
    "attn_resolutions": [16, 8],
    "channels_per_head": 64,
    "logvar_channels": 128,
}
UNSEEN_EDM2 = {  # which no shape shows
    **{"dropout": 0.0, "label_balance": 0.5, "concat_balance": 0.5, "res_balance": 0.3, "attn_balance": 0.3},
    **{"clip_act": 256, "sigma_data": 0.5},
}


def infer_edm2(state: dict, recorded: dict | None = None) -> dict:
    """Constructor arguments of an EDM2 network by its released names and shapes (specs/edm2.md sections 4, 7).

    They rebuild all names and shapes. What no shape shows is left out and has its default (`UNSEEN_EDM2`). The number
    of heads does not show either: channels_per_head is 64, as in every released network; where attention at fewer
    channels shows that it cannot be, one head at the narrowest attention, which is a GUESS. Widths are products:
    model_channels is the largest that divides them all, so that channel_mult starts with 1 wherever it can.

    Args:
      state: {released name: array}. recorded: arguments that the file records; they decide between equal products.

    Raises:
      UnsafeOrDamaged: names that look like EDM2, but do not make a network.
    """
    return _shown_by(_infer_edm2, "EDM2", state, recorded or {})


def _infer_edm2(shapes: dict, recorded: dict) -> dict:
    first = next(m for m in map(_FIRST["edm2"].fullmatch, shapes) if m)
    resolution = int(first[1])
    # The decoder shows more than the encoder: it has blocks at every level even where num_blocks is 0.
    blocks = [re.fullmatch(r"unet\.dec\.(\d+)x\1_block(\d+)\.conv_res1\.weight", name) for name in shapes]
    levels, blocks_up = _levels_and_blocks(resolution, [m for m in blocks if m])
    widths = [shapes[f"unet.dec.{r}x{r}_block0.conv_res1.weight"][0] for r in levels]
    noise, emb = shapes["unet.emb_fourier.freqs"][0], shapes["unet.emb_noise.weight"][0]
    unit = math.gcd(*widths, noise, emb)
    logvar = shapes.get("logvar_fourier.freqs", (128,))[0]
    if min(*widths, unit, logvar) < 1 or shapes[first[0]][1] < 2:
        raise ValueError("no channels")
    base = recorded.get("model_channels")
    base = base if type(base) is int and base > 0 and unit % base == 0 else unit

    def multiplier(key, width, default):
        """None where the width is the default one, unless the file records a number."""
        return None if width == default and recorded.get(key) is None else _ratio(width, base)

    return {
        "class_name": "Precond",
        "img_resolution": resolution,
        "img_channels": shapes[first[0]][1] - 1,  # the last one is constant
        "label_dim": shapes.get("unet.emb_label.weight", (0, 0))[1],
        "model_channels": base,
        "channel_mult": [_ratio(width, base) for width in widths],
        "channel_mult_noise": multiplier("channel_mult_noise", noise, widths[0]),
        "channel_mult_emb": multiplier("channel_mult_emb", emb, max(widths)),
        "num_blocks": blocks_up - 1,
        "attn_resolutions": [r for r in levels if f"unet.dec.{r}x{r}_block0.attn_qkv.weight" in shapes],
        "channels_per_head": _channels_per_head(shapes, levels[-1], recorded.get("channels_per_head", 64)),
        "logvar_channels": logvar,
    }


def _channels_per_head(shapes: dict, low: int, wanted) -> int:
    """`wanted` if the attention that shows can have heads of that width; else the narrowest attention's channels."""
    attending = {shape[1] for name, shape in shapes.items() if name.endswith(".attn_qkv.weight")}
    middle = f"unet.dec.{low}x{low}_in0."  # attends unless it has fewer channels than a head
    least = 1 if f"{middle}attn_qkv.weight" in shapes else shapes[f"{middle}conv_res1.weight"][0] + 1

    def possible(c):
        return type(c) is int and c >= least and all(w >= c and w % (w // c) == 0 for w in attending)

    return next(c for c in (wanted, min(attending, default=least), 1) if possible(c))


def edm2_config(recorded: dict, state: dict) -> dict:
    """`recorded` completed from the shapes, with which it must agree; all of it inferred if nothing is recorded.

    Raises:
      UnsafeOrDamaged: a recorded argument contradicts the parameters.
    """
    inferred = infer_edm2(state, recorded)
    if not recorded:
        return inferred
    unbounded = recorded.get("clip_act", 0) is None
    _check_numbers(recorded, [key for key in UNSEEN_EDM2 if not (key == "clip_act" and unbounded)])
    return _completed(recorded, inferred, DEFAULTS_EDM2, narrowest=inferred["channels_per_head"])
