"""A timm name or a file -> published weights under timm's names: ViT and DeiT (images), AST (sounds).

Files are read as data, never as code. AST's weights have their authors' names, or those of Hugging Face's transformers:
what it saves and what its version 4 has in memory, or what its version 5 has."""

import hashlib
import json
import math
import pickle
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import model_entrypoint
from torch import Tensor

from meamtm.config import WEIGHT_FILES, WEIGHT_SUFFIXES, EncoderConfig, nearest
from meamtm.errors import CheckpointError, ConfigError

Weights = dict[str, Tensor]
PLAIN = ("timm.models.vision_transformer", "timm.models.deit")
"""timm's modules of transformers that are built as ours is."""
DAMAGED = (
    *(SafetensorError, pickle.UnpicklingError, RuntimeError, ValueError, LookupError, TypeError, AttributeError),
    *(AssertionError, EOFError, OSError, struct.error),
)
"""What torch.load and load_file raise, each having been seen, on bytes that are no weights."""
LEAST = {
    "patch_embed.proj.weight": 4,
    "pos_embed": 3,
    "blocks.0.attn.qkv.weight": 2,
    "blocks.0.mlp.fc1.weight": 2,
}
"""Weights that every model has here, and how many axes each has."""
TOKENS = ("cls_token", "reg_token", "dist_token")
"""Those that a model may have beside its patches."""
AST_ROWS = (12, 10, 9, 8)
"""Rows of AST's patches for its strides 10, 12, 14 and 16. The first that divides the number of patches is the right
one for 1,024 frames (AudioSet) and 128 (Speech Commands), and for 512 (ESC-50) with a stride of 10 or 16."""
HUGGING_FACE = (
    (r"^audio_spectrogram_transformer\.", ""),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^(?:encoder\.layer|layers)\.", "blocks."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.attention\.q_proj\.", ".attn.query."),
    (r"\.attention\.k_proj\.", ".attn.key."),
    (r"\.attention\.v_proj\.", ".attn.value."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.layernorm\.", "fc_norm."),
    (r"^classifier\.dense\.", "head."),
)
"""transformers' names -> timm's, one rule after the other."""
AUTHORS = ((r"^module\.", ""), (r"^v\.(?!head)", ""), (r"^mlp_head\.0\.", "fc_norm."), (r"^mlp_head\.1\.", "head."))
"""AST's names -> timm's; `v.head` is what is left of the image model's head."""


@dataclass(frozen=True)
class Published:
    """Weights under timm's names, but positions under ours: `positions.grid` and, of tokens, `positions.first`."""

    source: str
    """timm's name, or the file."""
    digest: str | None
    """SHA-256 of the file."""
    weights: Weights
    num_heads: int | None
    """None where nothing tells."""

    @property
    def is_of_images(self) -> bool:
        """Whether patches have three colours."""
        return self.weights["patch_embed.proj.weight"].shape[1] == 3

    @property
    def width(self) -> int:
        """Width of a token."""
        return self.weights["patch_embed.proj.weight"].shape[0]

    @property
    def depth(self) -> int:
        """Number of blocks."""
        blocks = (re.match(r"blocks\.(\d+)\.", name) for name in self.weights)
        return 1 + max(int(block[1]) for block in blocks if block)

    @property
    def mlp_width(self) -> int:
        """Hidden width of a block's MLP."""
        return self.weights["blocks.0.mlp.fc1.weight"].shape[0]


def read_published(config: EncoderConfig, grid_size: tuple[int, int]) -> Published:
    """Reads the file, or has timm download the model, that `encoder.pretrained` names.

    As many positions as our own grid has are taken for one like it, where neither a square nor a config tells.
    Raises ConfigError where there is no such file or model, CheckpointError where its weights cannot be had or used.
    """
    path = config.pretrained_path
    return _from_timm(config.pretrained) if path is None else _from_file(path, grid_size)


def _from_timm(name: str) -> Published:
    if not timm.is_model(name.partition(".")[0]) or model_entrypoint(name).__module__ not in PLAIN:
        known = [*timm.list_models("vit_*", module="vision_transformer"), *timm.list_models("deit_*", module="deit")]
        near = nearest(name, known)
        raise ConfigError(
            f"encoder.pretrained={name} is no ViT or DeiT that timm knows; "
            + (f"did you mean {near}? " if near else "")
            + f"A file must end in {', '.join(WEIGHT_SUFFIXES)}, a folder must be written with a /"
        )
    try:
        model: Any = timm.create_model(name, pretrained=True)
    except Exception as error:  # timm passes on whatever its ways to download raise
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"encoder.pretrained={name}: timm does not get its weights ({reason}); connect to the network once, "
            f"or name a file of them"
        ) from error
    weights = _with_positions(name, _checked(name, model.state_dict()), [model.patch_embed.grid_size[0]])
    return Published(name, None, weights, model.blocks[0].attn.num_heads)


def _from_file(path: Path, grid_size: tuple[int, int]) -> Published:
    file = _file(path)
    facts = _facts(file.with_name("config.json"))
    weights = _timm_names(str(path), _read(file))
    weights = _with_positions(str(path), weights, _possible_rows(weights, _rows(facts), grid_size))
    width = weights["patch_embed.proj.weight"].shape[0]
    # A file does not tell; in ViT, DeiT and AST up to the size Large, a head's width is 64.
    usual = width // 64 if width % 64 == 0 and width <= 1024 else None
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return Published(str(path), digest, weights, facts.get("num_attention_heads", usual))


def _file(path: Path) -> Path:
    path = path.expanduser()
    found = [path / name for name in WEIGHT_FILES if (path / name).is_file()] if path.is_dir() else [path]
    if not found:
        raise ConfigError(
            f"encoder.pretrained={path} is a folder without {' or '.join(WEIGHT_FILES)}; name the file itself"
        )
    if not found[0].is_file():
        raise ConfigError(f"encoder.pretrained={path}: no such file; name one that exists, or a model that timm knows")
    if found[0].suffix not in WEIGHT_SUFFIXES:
        raise ConfigError(f"encoder.pretrained={path} does not end in {', '.join(WEIGHT_SUFFIXES)}; name such a file")
    return found[0]


def _read(file: Path) -> Weights:
    """Reads tensors, and nothing that would run."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        found = torch.load(file, map_location="cpu", weights_only=True)
    except DAMAGED as error:
        raise CheckpointError(
            f"encoder.pretrained={file} is damaged or holds more than weights; get it anew, or as .safetensors"
        ) from error
    for wrapping in ("model", "state_dict"):  # DeiT's authors, and many scripts
        if isinstance(found, Mapping) and isinstance(found.get(wrapping), Mapping):
            found = found[wrapping]
    items = found.items() if isinstance(found, Mapping) else ()
    return {str(name): value for name, value in items if isinstance(value, Tensor)}


def _facts(file: Path) -> dict[str, int]:
    """Gives what transformers wrote beside the weights of an AST: whole numbers of config.json."""
    try:
        facts = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}  # weights come without it too
    is_ast = isinstance(facts, dict) and facts.get("model_type") == "audio-spectrogram-transformer"
    return {key: value for key, value in facts.items() if isinstance(value, int)} if is_ast else {}


def _rows(facts: Mapping[str, int]) -> int | None:
    bands, patch, stride = (facts.get(key, 0) for key in ("num_mel_bins", "patch_size", "frequency_stride"))
    return (bands - patch) // stride + 1 if bands and patch and stride else None


def _timm_names(source: str, named: Weights) -> Weights:
    if any(name.endswith("embeddings.patch_embeddings.projection.weight") for name in named):
        return _checked(source, _joined(_renamed(named, HUGGING_FACE)))
    return _checked(source, _renamed(named, AUTHORS))


def _checked(source: str, weights: Weights) -> Weights:
    missing = [name for name, rank in LEAST.items() if name not in weights or weights[name].ndim != rank]
    if missing:
        some = ", ".join(list(weights)[:3]) or "no tensors"
        raise CheckpointError(
            f"encoder.pretrained={source} fits nothing here (it holds {some}, but no {missing[0]}); "
            f"take a ViT or DeiT as timm saves it, or an AST as its authors or transformers save it"
        )
    width = weights["patch_embed.proj.weight"].shape[0]
    for name in ("pos_embed", *TOKENS):
        shape = list(weights[name].shape) if name in weights else [1, 1, width]
        if len(shape) != 3 or [shape[0], shape[2]] != [1, width]:
            raise CheckpointError(
                f"encoder.pretrained={source} has {name} of {shape}, not of [1, n, {width}]; take weights as they were "
                f"published"
            )
    return weights


def _renamed(named: Mapping[str, Tensor], rules: tuple[tuple[str, str], ...]) -> Weights:
    def rename(name: str) -> str:
        for pattern, new in rules:
            name = re.sub(pattern, new, name)
        return name

    return {rename(name): value for name, value in named.items()}


def _joined(weights: Weights) -> Weights:
    """Puts queries, keys and values into one matrix, in this order, as timm does."""
    joined = dict(weights)
    for name in weights:
        parts = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        if ".attn.query." in name and all(part in joined for part in parts):
            joined[name.replace(".query.", ".qkv.")] = torch.cat([joined.pop(part) for part in parts])
    return joined


def _with_positions(source: str, weights: Weights, possible_rows: Sequence[int]) -> Weights:
    """Parts the positions of tokens from those of patches, and lays these out in rows."""
    given = dict(weights)
    positions = given.pop("pos_embed")
    total, width = positions.shape[1:]
    num_tokens = _num_tokens(weights)
    for num_first in (num_tokens, 0):  # some models have no positions for their tokens
        num_patches = total - num_first
        num_rows = next((rows for rows in possible_rows if 0 < rows <= num_patches and num_patches % rows == 0), None)
        if num_rows is not None:
            first = positions[:, :num_first] if num_first else positions.new_zeros(1, num_tokens, width)
            grid = positions[:, num_first:].reshape(1, num_rows, -1, width)
            return given | {"positions.grid": grid} | ({"positions.first": first} if num_tokens else {})
    raise CheckpointError(
        f"encoder.pretrained={source} has {total} positions, {num_tokens} of them of tokens, and nothing tells how the "
        f"others form rows; keep its config.json beside it, or take other weights"
    )


def _num_tokens(weights: Weights) -> int:
    return sum(weights[name].shape[1] for name in TOKENS if name in weights)


def _possible_rows(weights: Weights, told: int | None, ours: tuple[int, int]) -> list[int]:
    if told is not None:
        return [told]
    total, num_tokens = weights["pos_embed"].shape[1], _num_tokens(weights)
    if weights["patch_embed.proj.weight"].shape[1] == 3:
        sides = {num: math.isqrt(max(num, 0)) for num in (total - num_tokens, total)}
        return [side for num, side in sides.items() if side * side == num]
    return [*([ours[0]] if ours[0] * ours[1] == total - num_tokens else []), *AST_ROWS]
