"""An encoder that answers twice: what it was told by labels, and what by a teacher (DeiT, Touvron 2021, section 4)."""

import torch
from jaxtyping import Float, Int
from timm.layers import trunc_normal_  # type: ignore[reportPrivateImportUsage]
from torch import Tensor, nn

from meamtm.config import EncoderConfig
from meamtm.model.encoder import Encoder, Image


class DistilledEncoder(Encoder):
    """Two tokens with a head each: labels teach the first one, a teacher the second; asked, it gives their mean."""

    def __init__(self, config: EncoderConfig, image_size: tuple[int, int], num_labels: int) -> None:
        super().__init__(config, image_size, num_labels)
        self.head_dist = nn.Linear(config.width, num_labels)
        trunc_normal_(self.head_dist.weight, std=0.02)
        nn.init.zeros_(self.head_dist.bias)

    def forward(self, x: Image, num_frames: Int[Tensor, " batch"] | None = None) -> Float[Tensor, "batch *head label"]:
        """Gives the logits of both heads in training, or else their mean."""
        tokens, _ = self._listen(x, num_frames, self.num_prefix_tokens)
        first, second = self.head_drop(tokens).unbind(1)
        logits = torch.stack((self.head(first), self.head_dist(second)), dim=1)  # (batch, head, label)
        return logits if self.training else logits.mean(1)
