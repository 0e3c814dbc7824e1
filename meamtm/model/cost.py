"""A configuration -> what it costs, before anything is trained."""

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from meamtm.config import RunConfig
from meamtm.model.cnn import ConvNet
from meamtm.model.encoder import Encoder
from meamtm.model.transformer import make_encoder


@dataclass(frozen=True)
class Cost:
    """Sizes of a model; MACs are those of one clip forward through stem, encoder and head."""

    num_params: int
    num_tokens: int
    num_macs: int


def weightless(config: RunConfig, num_labels: int) -> Encoder | ConvNet:
    """Builds the model behind the spectrogram on torch's meta device, where weights have a shape and no memory."""
    with torch.device("meta"):
        return make_encoder(config, num_labels)


def cost(config: RunConfig, num_labels: int = 10) -> Cost:
    """Builds the model without memory for its weights and counts."""
    encoder = weightless(config, num_labels).eval().requires_grad_(False)
    image = torch.empty(1, 1, config.mel.num_bands, config.num_frames, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder(image)
    num_params = sum(parameter.numel() for parameter in encoder.parameters())
    num_params += config.mel.num_bands * config.mel.num_bins if config.mel.trainable else 0
    return Cost(
        num_params=num_params,
        num_tokens=encoder.num_tokens,
        num_macs=counter.get_total_flops() // 2,
    )
