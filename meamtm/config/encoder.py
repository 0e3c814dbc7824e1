"""Section `encoder`: stem, transformer and head, and architectures that have a name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ModelWrapValidatorHandler, model_validator

from meamtm.config.section import Section, Word

PRESETS: dict[str, dict[str, Any]] = {
    "ast_base": {
        "stem": "patch",
        "patch": (16, 16),
        "stride": (10, 10),
        "heads": 12,
        "head_dim": 64,
        "depth": 12,
        "mlp_ratio": 4.0,
        "pool": "cls_dist",
        "positions": "joint",
    }
}
"""Architectures that have a name, and what it fixes."""

PATCHOUTS = ("patchout", "patchout_time", "patchout_freq")

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
"""Of files that hold weights."""
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
"""What such a file is called in a folder that Hugging Face's libraries wrote."""


class EncoderConfig(Section):
    """Log-mel spectrogram -> logits."""

    preset: Literal["none", "ast_base"] = Field(
        default="none", description="ast_base: stem, size and pool of the Audio Spectrogram Transformer (Gong 2021)"
    )
    pretrained: str = Field(
        default="none",
        min_length=1,
        description="weights to begin with: timm's name of a ViT or DeiT, or a file or folder of one, or of an AST",
    )
    cnn: Word = Field(
        default="none",
        description="timm's name of a convolutional network, as resnet10t, in the transformer's place: to compare "
        "with, or to teach (distill.teacher); only dropout and drop_path count beside it",
    )
    stem: Literal["conv", "patch", "shifted_patch"] = Field(
        default="conv",
        description="conv: stages of two 3x3 convolutions and a pooling; patch: a linear map; shifted_patch: one of "
        "each patch and four half a patch away (Lee 2021)",
    )
    stem_channels: tuple[int, ...] = Field(
        default=(16, 32, 64, 128), min_length=1, max_length=6, description="channels of each convolutional stage"
    )
    stem_activation: Literal["relu", "gelu", "silu"] = Field(
        default="relu", description="of the convolutional stem; the smooth ones cost more on a CPU"
    )
    patch: tuple[int, int] = Field(default=(16, 16), description="patch size of both patch stems: bands, frames")
    stride: tuple[int, int] = Field(
        default=(16, 16), description="from one patch to the next: bands, frames; less than the patch overlaps"
    )
    heads: int = Field(default=4, ge=1, le=64, description="attention heads")
    head_dim: int = Field(default=64, ge=4, le=256, description="width of one head; a token has heads x head_dim")
    depth: int = Field(default=2, ge=1, le=48, description="transformer blocks")
    mlp_ratio: float = Field(default=2.0, gt=0, le=8, description="hidden width of a block's MLP over a token's")
    attention: Literal["joint", "locality", "separable"] = Field(
        default="joint",
        description="joint: of all patches; locality: of all but a token's own, at a learnt temperature (Lee 2021); "
        "separable: along frequency and along time, block by block in turn (axial; Ristea 2022)",
    )
    pool: Literal["mean", "cls", "cls_dist", "deit", "attention"] = Field(
        default="mean",
        description="how tokens become one vector; cls_dist: mean of two tokens of their own, as AST; deit: two with "
        "a head each, of which the second learns from distill.teacher alone (Touvron 2021)",
    )
    positions: Literal["joint", "separate"] = Field(
        default="joint", description="a learned vector for each patch, or one for its row plus one for its column"
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout before the head")
    drop_path: float = Field(
        default=0.1, ge=0, lt=1, description="stochastic depth, from none in the first block up to this in the last"
    )
    patchout: float = Field(default=0.0, ge=0, lt=1, description="fraction of patches left out of each training step")
    patchout_time: float = Field(default=0.0, ge=0, lt=1, description="fraction of columns left out, before patchout")
    patchout_freq: float = Field(default=0.0, ge=0, lt=1, description="fraction of rows left out, before patchout")

    @property
    def width(self) -> int:
        """Width of a token: heads x head_dim."""
        return self.heads * self.head_dim

    @property
    def pretrained_path(self) -> Path | None:
        """File or folder of the weights to begin with; None where there are none, or timm's."""
        is_path = "/" in self.pretrained or self.pretrained.endswith(WEIGHT_SUFFIXES)
        return Path(self.pretrained) if is_path else None

    @model_validator(mode="wrap")
    @classmethod
    def _width_is_heads_times_head_dim(cls, given: Any, build: ModelWrapValidatorHandler["EncoderConfig"]) -> Any:
        """Accepts `width` as a claim to be checked; it is never stored, since two other keys make it."""
        if not isinstance(given, Mapping) or "width" not in given:
            return build(given)
        config = build({key: value for key, value in given.items() if key != "width"})
        if given["width"] not in (config.width, str(config.width)):
            raise ValueError(
                f"encoder.width={given['width']} is not encoder.heads x encoder.head_dim "
                f"({config.heads} x {config.head_dim} = {config.width}); leave encoder.width out and set those two"
            )
        return config

    @model_validator(mode="before")
    @classmethod
    def _preset_fixes_its_keys(cls, given: Any) -> Any:
        """Fills in what a preset fixes; a key that says otherwise contradicts it.

        pydantic runs what is defined last first, so a claimed `width` is checked against the preset's.
        """
        preset = given.get("preset", "none") if isinstance(given, Mapping) else "none"
        if not isinstance(preset, str) or preset not in PRESETS:
            return given
        for key, value in PRESETS[preset].items():
            found = tuple(given[key]) if isinstance(given.get(key), list) else given.get(key, value)
            if found != value:
                shown = list(value) if isinstance(value, tuple) else value
                raise ValueError(
                    f"encoder.{key}={given[key]} contradicts encoder.preset={preset}, which has {shown}; "
                    f"leave one of them out"
                )
        return {**given, **PRESETS[preset]}

    @model_validator(mode="after")
    def _check(self) -> "EncoderConfig":
        for axis, patch, stride in zip(("bands", "frames"), self.patch, self.stride, strict=True):
            if patch < 1 or not 1 <= stride <= patch:
                raise ValueError(
                    f"encoder.stride={list(self.stride)} must lie in 1..patch ({list(self.patch)}) along {axis}; "
                    f"a larger stride skips {axis}"
                )
        if self.attention == "separable":
            self._check_separable()
        if self.cnn != "none":
            self._check_cnn()
        if min(self.stem_channels) < 8 or max(self.stem_channels) > 4096:
            raise ValueError(
                f"encoder.stem_channels={list(self.stem_channels)} must each lie in 8..4096; correct those outside"
            )
        return self

    def _check_cnn(self) -> None:
        """A convolutional network has neither patches nor the size that a preset or published weights have."""
        for key, nothing in (("preset", "none"), ("pretrained", "none"), *((key, 0.0) for key in PATCHOUTS)):
            if getattr(self, key) != nothing:
                raise ValueError(
                    f"encoder.{key}={getattr(self, key)} is for a transformer, and encoder.cnn={self.cnn} takes its "
                    f"place; leave one of them out"
                )

    def _check_separable(self) -> None:
        """Attention along one axis needs every patch in its place, and nothing beside patches."""
        if self.pool in ("cls", "cls_dist", "deit"):
            raise ValueError(
                f"encoder.pool={self.pool} adds tokens that have no place on either axis, and "
                "encoder.attention=separable attends along axes; set encoder.pool=mean or attention"
            )
        for key in PATCHOUTS:
            if getattr(self, key) > 0:
                raise ValueError(
                    f"encoder.{key}={getattr(self, key):g} leaves holes in the grid along whose axes "
                    f"encoder.attention=separable attends; set encoder.{key}=0"
                )


def preset_keys(preset: object) -> frozenset[str]:
    """Dotted keys that a preset fixes; none where there is no such preset."""
    fixed = PRESETS[preset] if isinstance(preset, str) and preset in PRESETS else {}
    return frozenset(f"encoder.{key}" for key in fixed)
