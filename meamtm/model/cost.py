"""A configuration -> what it costs, before anything is trained."""

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from meamtm.config import RunConfig
from meamtm.model.transformer import make_encoder


@dataclass(frozen=True)
class Cost:
    """Sizes of a model; MACs are those of one clip forward through stem, encoder and head."""

    num_params: int
    num_tokens: int
    num_macs: int
    checkpoint_bytes: int


def cost(config: RunConfig, num_labels: int = 10) -> Cost:
    """Builds the model without memory for its weights and counts."""
    with torch.device("meta"):
        size = (config.mel.num_bands, config.num_frames)
        encoder = make_encoder(config.encoder, size, num_labels).eval().requires_grad_(False)
        image = torch.empty(1, 1, *size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder(image)
    num_params = sum(parameter.numel() for parameter in encoder.parameters())
    num_params += config.mel.num_bands * (config.mel.num_fft // 2 + 1) if config.mel.trainable else 0
    copies = 2 + 2 + (config.train.ema_decay > 0)  # weights kept, weights trained, two moments, the average
    return Cost(
        num_params=num_params,
        num_tokens=encoder.patch_embed.num_patches + encoder.num_prefix_tokens,
        num_macs=counter.get_total_flops() // 2,
        checkpoint_bytes=4 * num_params * copies,
    )
