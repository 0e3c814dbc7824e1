"""Published weights -> our encoder, as the Audio Spectrogram Transformer takes them over (Gong 2021, section 2.2), and
a report of what became of each.

Three colours become one channel by their sum. Positions along an axis that is no longer than the source's are cut from
its middle, along a longer one interpolated. Other sizes of patch are resampled (Beyer 2023, FlexiViT)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers import resample_patch_embed  # type: ignore[reportPrivateImportUsage]
from torch import Tensor

from meamtm.config import EncoderConfig
from meamtm.config.encoder import PRESETS
from meamtm.errors import CheckpointError, ConfigError
from meamtm.model.cnn import ConvNet
from meamtm.model.encoder import Encoder
from meamtm.model.positions import JointPositions
from meamtm.model.published import Published, Weights, read_published
from meamtm.model.stem import PatchStem

SIZE = ("heads", "head_dim", "depth", "mlp_ratio")
"""What published weights must agree with."""
AS_A_WORD = str.maketrans("()", "[]", " ")
Taken = dict[str, tuple[Tensor, str]]
"""Name of a weight of ours -> what it becomes, and what was done to it; an empty string: nothing."""


@dataclass(frozen=True)
class Borrowed:
    """What became of published weights. Names are timm's, those of positions are ours."""

    source: str
    digest: str | None
    """SHA-256, of a file."""
    matched: tuple[str, ...]
    """Weights of ours, taken as they were."""
    resized: Mapping[str, str]
    """Weights of ours, and what was done to those taken."""
    dropped: Mapping[str, str]
    """Weights of the source, and why they have no place."""
    fresh: tuple[str, ...]
    """Weights of ours that begin at random."""

    def __str__(self) -> str:
        head = "the head among them" if "head.weight" in self.matched else "not the head"
        lines = [f"begins with {self.source}: {len(self.matched)} weights as they are, {head}"]
        lines += [f"  {name}: {how}" for name, how in self.resized.items()]
        for why in dict.fromkeys(self.dropped.values()):
            lines.append(f"  dropped ({why}): {', '.join(name for name in self.dropped if self.dropped[name] == why)}")
        return "\n".join([*lines, f"  fresh: {', '.join(self.fresh) or 'nothing'}"])


@torch.no_grad()
def borrow(encoder: Encoder | ConvNet, config: EncoderConfig) -> Borrowed:
    """Puts the weights that `encoder.pretrained` names into a new encoder of this config.

    Raises ConfigError where the encoder has another size, CheckpointError where the source is another kind of network,
    or has weights of another shape or that are no numbers.
    """
    assert isinstance(encoder, Encoder), "a config refuses published weights for another network"
    published = read_published(config, encoder.patch_embed.grid_size)
    _check_size(published, config)
    left = dict(published.weights)  # each step takes away what it has a place for
    steps = (_patches, _tokens, _grid, _norms, _blocks, *(() if published.is_of_images else (_head,)))
    taken: Taken = {}
    for step in steps:
        taken |= step(left, encoder)
    ours = dict(encoder.named_parameters())
    _check_blocks(published.source, left, ours.keys() - taken.keys())
    for name, (weight, _) in taken.items():
        _check_weight(published.source, name, weight, ours[name])
        ours[name].copy_(weight)
    return Borrowed(
        published.source,
        published.digest,
        matched=tuple(name for name in ours if name in taken and not taken[name][1]),
        resized={name: taken[name][1] for name in ours if name in taken and taken[name][1]},
        dropped={name: _why(name, published, encoder, config) for name in left},
        fresh=tuple(name for name in ours if name not in taken),
    )


def fit_positions(
    grid: Float[Tensor, "1 row column width"], size: tuple[int, int]
) -> Float[Tensor, "1 new_row new_column width"]:
    """Cuts positions to the middle along an axis that is long enough, and stretches them along one that is not."""
    enough = [max(have, want) for have, want in zip(grid.shape[1:3], size, strict=True)]
    fitted = F.interpolate(grid.permute(0, 3, 1, 2).float(), size=enough, mode="bilinear")
    for axis, want in zip((2, 3), size, strict=True):
        fitted = fitted.narrow(axis, fitted.shape[axis] // 2 - want // 2, want)
    return fitted.permute(0, 2, 3, 1)


def _patches(left: Weights, encoder: Encoder) -> Taken:
    if not isinstance(encoder.patch_embed, PatchStem):
        return {}
    name, patch, done = "patch_embed.proj", encoder.patch_embed.patch_size, []
    weight = left.pop(f"{name}.weight").float()  # (width, channel, band, frame)
    if weight.shape[1] != 1:
        done.append(f"{weight.shape[1]} channels summed")
        weight = weight.sum(1, keepdim=True)
    if weight.shape[2:] != patch:
        done.append(_change(weight.shape[2:], patch))
        weight = resample_patch_embed(weight, list(patch))
    bias = {f"{name}.bias": (left.pop(f"{name}.bias"), "")} if f"{name}.bias" in left else {}
    return {f"{name}.weight": (weight, ", ".join(done)), **bias}


def _tokens(left: Weights, encoder: Encoder) -> Taken:
    """Takes the class and the distillation token, each with its position; positions that are separate have none for
    tokens, which then hold their own."""
    names = {"cls_token": "cls_token", "dist_token": "reg_token"}
    places = [(place, theirs, our) for place, (theirs, our) in enumerate(names.items())]
    places = [(place, theirs, our) for place, theirs, our in places if _has(encoder, our) and theirs in left]
    if not places:
        return {}
    theirs_first = left.pop("positions.first")
    if not isinstance(encoder.positions, JointPositions):
        return {our: (left.pop(theirs) + theirs_first[:, [place]], "and its position") for place, theirs, our in places}
    assert encoder.positions.first is not None
    first = encoder.positions.first.clone()
    for place, _, _ in places:
        first[:, place] = theirs_first[:, place]
    known = [our for _, _, our in places]
    is_all = first.shape == theirs_first.shape and len(known) == first.shape[1]
    taken = {our: (left.pop(theirs), "") for _, theirs, our in places}
    return taken | {"positions.first": (first, "" if is_all else f"of {' and '.join(known)} alone")}


def _grid(left: Weights, encoder: Encoder) -> Taken:
    if not isinstance(encoder.patch_embed, PatchStem):
        return {}
    theirs, size = left.pop("positions.grid"), encoder.patch_embed.grid_size
    grid = fit_positions(theirs, size)
    change = "" if theirs.shape[1:3] == size else _change(theirs.shape[1:3], size)
    if isinstance(encoder.positions, JointPositions):
        return {"positions.grid": (grid, change)}
    freq, time = grid.mean(2, keepdim=True), grid.mean(1, keepdim=True)
    time = time - freq.mean(1, keepdim=True)  # row plus column is then the nearest such sum to each patch's own
    parts = {"positions.freq": (freq, "mean of each row"), "positions.time": (time, "mean of each column")}
    return {name: (part, f"{change}, {how}".removeprefix(", ")) for name, (part, how) in parts.items()}


def _norms(left: Weights, encoder: Encoder) -> Taken:
    """Takes the norm before pooling, which comes after it where our pool is a mean of patches, and AST's second."""
    ours = dict(encoder.named_parameters())
    last_of_ours = "norm" if "norm.weight" in ours else "fc_norm"
    last_of_theirs = "norm" if "norm.weight" in left else "fc_norm"
    taken: Taken = {}
    for theirs, our in ((last_of_theirs, last_of_ours), ("fc_norm", "fc_norm")):
        how = "" if theirs == our else f"of {theirs}"
        for kind in ("weight", "bias"):
            name = f"{our}.{kind}"
            if f"{theirs}.{kind}" in left and name in ours and name not in taken:
                taken[name] = (left.pop(f"{theirs}.{kind}"), how)
    return taken


def _head(left: Weights, encoder: Encoder) -> Taken:
    return _equal(left, {f"head.{name}": weight for name, weight in encoder.head.named_parameters()})


def _blocks(left: Weights, encoder: Encoder) -> Taken:
    return _equal(left, dict(encoder.blocks.named_parameters(prefix="blocks")))


def _equal(left: Weights, ours: Mapping[str, Tensor]) -> Taken:
    same = [name for name in ours if name in left and left[name].shape == ours[name].shape]
    return {name: (left.pop(name), "") for name in same}


def _has(encoder: Encoder, token: str) -> bool:
    return getattr(encoder, token) is not None


def _change(old: tuple[int, ...], new: tuple[int, ...]) -> str:
    return f"{old[0]} x {old[1]} -> {new[0]} x {new[1]}"


def _check_size(published: Published, config: EncoderConfig) -> None:
    width, num_heads = published.width, published.num_heads
    same_heads = config.heads == num_heads if num_heads is not None else True
    same_mlp = int(config.width * config.mlp_ratio) == published.mlp_width
    if config.width == width and same_heads and config.depth == published.depth and same_mlp:
        return
    ratio = math.ceil(1e4 * published.mlp_width / width) / 1e4  # rounded up, since timm rounds the hidden width down
    if num_heads is None:
        heads, remedy = f"width {width}", f"encoder.heads x encoder.head_dim to {width},"
    else:
        heads = f"{num_heads} heads of {width // num_heads}"
        remedy = f"encoder.heads={num_heads} encoder.head_dim={width // num_heads}"
    if config.preset != "none":  # which fixes its size; what else it fixes stays
        rest = {key: value for key, value in PRESETS[config.preset].items() if key not in SIZE}
        words = (f"encoder.{key}={str(value).translate(AS_A_WORD)}" for key, value in rest.items())
        remedy = f"encoder.preset=none {' '.join(words)} {remedy}"
    raise ConfigError(
        f"encoder.pretrained={published.source} has {heads}, depth {published.depth}, MLP ratio {ratio:g}; "
        f"set {remedy} encoder.depth={published.depth} encoder.mlp_ratio={ratio:g}"
    )


def _check_blocks(source: str, left: Weights, fresh: set[str]) -> None:
    """Refuses a network that is built otherwise, of which a part would be missing here, and half a one."""
    extra = sorted(name for name in left if name.startswith(("blocks.", "norm_pre.")))
    missing = sorted(name for name in fresh if name.startswith("blocks.") and name.endswith("weight"))
    if extra or missing:
        what = f"has {extra[0]}, for which there is no place here" if extra else f"lacks {missing[0]}"
        raise CheckpointError(f"encoder.pretrained={source} {what}; take a plain ViT or DeiT, or an AST, and all of it")


def _check_weight(source: str, name: str, weight: Tensor, ours: Tensor) -> None:
    fault = f"of {list(weight.shape)}, not of {list(ours.shape)}" if weight.shape != ours.shape else ""
    if not fault and not weight.isfinite().all():
        fault = "not all numbers"
    if fault:
        raise CheckpointError(f"encoder.pretrained={source} has {name} {fault}; take weights as they were published")


def _why(name: str, published: Published, encoder: Encoder, config: EncoderConfig) -> str:
    if name.startswith("head.") and not published.is_of_images:
        return f"{published.weights['head.weight'].shape[0]} labels, not {encoder.num_classes}"
    if name.startswith(("patch_embed.", "positions.grid")):
        return f"encoder.stem={config.stem}"
    if name.endswith("_token") or name == "positions.first":
        return f"encoder.pool={config.pool}"
    return "of images" if "head" in name else "no place here"
