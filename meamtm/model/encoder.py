"""Spectrogram as an image -> tokens -> one vector -> logits: timm's VisionTransformer, for sound.

Beside timm's own: positions that fit every length, patchout along time and frequency, true lengths of clips in a padded
batch, and the two averaged tokens of the Audio Spectrogram Transformer (AST, Gong 2021)."""

from functools import partial
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from meamtm.config import EncoderConfig
from meamtm.model.attention import Attention
from meamtm.model.block import Block
from meamtm.model.mlp import Mlp
from meamtm.model.patchout import Patchout
from meamtm.model.positions import JointPositions, SeparatePositions
from meamtm.model.restricted_attention import LocalityAttention, SeparableAttention
from meamtm.model.stem import ConvStem, PatchStem, ShiftedPatchStem, Stem

Image = Float[Tensor, "batch 1 band frame"]
Tokens = Float[Tensor, "batch token width"]
Read = Float[Tensor, "batch read width"]
Heard = Bool[Tensor, "batch token"]
"""False where a token stands for padding alone."""
POOLS: dict[str, Literal["avg", "token", "map"]] = {
    "mean": "avg",
    "cls": "token",
    "cls_dist": "token",
    "deit": "token",
    "attention": "map",
}
"""Our words -> timm's."""


class Encoder(VisionTransformer):
    """A transformer over the patches of spectrograms of any length."""

    patch_embed: Stem  # type: ignore[reportIncompatibleVariableOverride]

    def __init__(self, config: EncoderConfig, image_size: tuple[int, int], num_labels: int) -> None:
        is_ast = config.pool == "cls_dist"
        super().__init__(
            img_size=image_size,
            patch_size=config.patch,
            in_chans=1,
            num_classes=num_labels,
            global_pool=POOLS[config.pool],
            embed_dim=config.width,
            depth=config.depth,
            num_heads=config.heads,
            mlp_ratio=config.mlp_ratio,
            class_token=config.pool in ("cls", "cls_dist", "deit"),
            reg_tokens=1 if config.pool in ("cls_dist", "deit") else 0,  # the distillation token
            pos_embed="none",
            dynamic_img_size=True,
            drop_rate=config.dropout,
            drop_path_rate=config.drop_path,
            embed_layer=_stem(config),
            block_fn=Block,
            attn_layer=_attention(config),
            mlp_layer=Mlp,
        )
        grid = self.patch_embed.grid_size
        for number, block in enumerate(self.blocks):
            if isinstance(block.attn, SeparableAttention):
                block.attn.num_rows, block.attn.along_time = grid[0], number % 2 == 1
        if is_ast:
            self.fc_norm = nn.LayerNorm(config.width)  # AST's head has torch's epsilon
        match config.positions:
            case "joint":
                self.positions = JointPositions(grid, config.width, self.num_prefix_tokens)
            case "separate":
                self.positions = SeparatePositions(grid, config.width)
        self.patchout = Patchout(config.patchout, config.patchout_freq, config.patchout_time)

    @property
    def num_tokens(self) -> int:
        """Tokens of a clip as long as those that it is made for."""
        return self.patch_embed.num_patches + self.num_prefix_tokens

    def forward(self, x: Image, num_frames: Int[Tensor, " batch"] | None = None) -> Float[Tensor, "batch label"]:  # type: ignore[reportIncompatibleMethodOverride]
        """Gives logits; `num_frames` are true lengths of spectrograms that are padded with zeros."""
        return self.head(self.embed(x, num_frames))

    def embed(self, image: Image, num_frames: Int[Tensor, " batch"] | None = None) -> Float[Tensor, "batch width"]:
        """Gives one vector per clip: what the head sees."""
        tokens, heard = self._listen(image, num_frames, self.num_prefix_tokens or None)
        return self.head_drop(self.fc_norm(self._summary(tokens, heard)))

    def tokens(self, image: Image, num_frames: Int[Tensor, " batch"] | None = None) -> tuple[Tokens, Heard | None]:
        """Gives the last block's tokens, normalised, and which of them are heard, if not all."""
        return self._listen(image, num_frames, num_read=None)

    def no_weight_decay(self) -> set[str]:
        """Names what keeps its size: tokens, the pooling one's too, and positions."""
        positions = (f"positions.{name}" for name, _ in self.positions.named_parameters())
        return {"cls_token", "reg_token", "attn_pool.latent", *positions}

    def _listen(self, image: Image, num_frames: Tensor | None, num_read: int | None) -> tuple[Read, Heard | None]:
        """Gives the first `num_read` of the last block's tokens, or all."""
        grid = self.patch_embed(image, num_frames)  # (batch, row, column, width)
        num_columns = None if num_frames is None else self.patch_embed.num_columns(num_frames)
        tokens = self._begin(grid, num_columns)
        heard = None if num_columns is None else self._heard(grid, num_columns)
        mask = None if heard is None else heard[:, None, None, :]  # (batch, head, query, key)
        *earlier, last = self.blocks
        for block, num_kept in (*((block, None) for block in earlier), (last, num_read)):
            if self.grad_checkpointing and self.training:
                tokens = checkpoint(block, tokens, mask, num_kept, use_reentrant=False)
            else:
                tokens = block(tokens, mask, num_kept)
        return self.norm(tokens), heard

    def _begin(self, grid: Float[Tensor, "batch row column width"], num_columns: Tensor | None) -> Tokens:
        """Adds positions, leaves patches out and puts the prefix tokens before the rest."""
        patches = self.patchout(grid + self.positions(grid, num_columns))  # (batch, patch, width)
        prefix: list[Tensor] = [token for token in (self.cls_token, self.reg_token) if token is not None]
        if not prefix:
            return patches
        first = torch.cat(prefix, dim=1) + self.positions.prefix()  # (1, prefix, width)
        return torch.cat((first.expand(patches.shape[0], -1, -1), patches), dim=1)

    def _heard(self, grid: Float[Tensor, "batch row column width"], num_columns: Int[Tensor, " batch"]) -> Heard:
        columns = torch.arange(grid.shape[2], device=grid.device) < num_columns[:, None]  # (batch, column)
        patches = columns[:, None, :].expand(-1, grid.shape[1], -1).flatten(1)  # (batch, patch)
        return nn.functional.pad(patches, (self.num_prefix_tokens, 0), value=True)

    def _summary(self, tokens: Read, heard: Heard | None) -> Float[Tensor, "batch width"]:
        patches = tokens[:, self.num_prefix_tokens :]
        heard = None if heard is None else heard[:, self.num_prefix_tokens :]
        if self.attn_pool is not None:
            return self.attn_pool(patches, None if heard is None else heard[:, None, None, :])
        if self.num_prefix_tokens > 0:
            return tokens[:, : self.num_prefix_tokens].mean(1)
        if heard is None:
            return patches.mean(1)
        weight = heard / heard.sum(1, keepdim=True)  # (batch, patch)
        return (weight[:, None, :].to(patches.dtype) @ patches).squeeze(1)


def _attention(config: EncoderConfig) -> type[Attention]:
    match config.attention:
        case "joint":
            return Attention
        case "locality":
            return LocalityAttention
        case "separable":
            return SeparableAttention


def _stem(config: EncoderConfig) -> "partial[ConvStem] | partial[PatchStem] | partial[ShiftedPatchStem]":
    match config.stem:
        case "conv":
            return partial(ConvStem, channels=config.stem_channels, activation=config.stem_activation)
        case "patch":
            return partial(PatchStem, stride=config.stride)
        case "shifted_patch":
            return partial(ShiftedPatchStem, stride=config.stride)
