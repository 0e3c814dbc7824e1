"""Waveforms -> logits: log-mel, stem, timm's transformer encoder, head."""

from functools import partial
from typing import Literal

from jaxtyping import Bool, Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from meamtm.config import EncoderConfig, RunConfig
from meamtm.model.mel import MelLayer
from meamtm.model.stem import ConvStem, PatchStem

POOLS: dict[str, Literal["avg", "token", "map"]] = {"mean": "avg", "cls": "token", "attention": "map"}
"""Our words -> timm's."""


class AudioTransformer(nn.Module):
    """Names sounds straight from waveforms (Gong 2021), with a stem and size that suit little data.

    Position embeddings are interpolated to the grid at hand, so clips may be longer or shorter than those trained on.
    """

    def __init__(self, config: RunConfig, num_labels: int) -> None:
        super().__init__()
        self.mel = MelLayer(config.mel)
        self.encoder = make_encoder(config.encoder, (config.mel.num_bands, config.num_frames), num_labels)

    def forward(
        self, waveform: Float[Tensor, "batch time"], mask: Bool[Tensor, "batch band frame"] | None = None
    ) -> Float[Tensor, "batch label"]:
        """Gives logits for samples in -1..1; masked cells of the spectrogram are set to the training clips' mean."""
        return self.encoder(self.image(waveform, mask))

    def image(
        self, waveform: Float[Tensor, "batch time"], mask: Bool[Tensor, "batch band frame"] | None = None
    ) -> Float[Tensor, "batch 1 band frame"]:
        """Gives the spectrogram as an image of one channel."""
        log_mel = self.mel(waveform)
        if mask is not None:
            log_mel = log_mel.masked_fill(mask, 0.0)
        return log_mel.unsqueeze(1)

    def features(self, waveform: Float[Tensor, "batch time"]) -> Float[Tensor, "batch width"]:
        """Gives one embedding per clip: the pooled tokens, before the head."""
        tokens = self.encoder.forward_features(self.image(waveform))
        return self.encoder.forward_head(tokens, pre_logits=True)


def make_encoder(config: EncoderConfig, image_size: tuple[int, int], num_labels: int) -> VisionTransformer:
    """Builds timm's encoder for spectrograms of (bands, frames), with the stem that the config names."""
    match config.stem:
        case "conv":
            stem = partial(ConvStem, channels=config.stem_channels)
        case "patch":
            stem = partial(PatchStem, stride=config.stride)
    return VisionTransformer(
        img_size=image_size,
        patch_size=config.patch,
        in_chans=1,
        num_classes=num_labels,
        global_pool=POOLS[config.pool],
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.heads,
        mlp_ratio=config.mlp_ratio,
        class_token=config.pool == "cls",
        dynamic_img_size=True,
        drop_rate=config.dropout,
        drop_path_rate=config.drop_path,
        patch_drop_rate=config.patchout,
        embed_layer=stem,
    )
