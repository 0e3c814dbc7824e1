"""Spectrogram with hidden patches -> a guess of what is hidden: what an encoder can learn without labels.

As in SimMIM (Xie 2022): hidden cells are set to the mean before the stem, whose convolutions would tell of them
otherwise, all patches go through the encoder, and one linear layer guesses the log-mel cells of each."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from meamtm.model.encoder import Encoder

Image = Float[Tensor, "batch 1 band frame"]
Hidden = Bool[Tensor, "batch patch"]


class MaskedPrediction(nn.Module):
    """An encoder that guesses patches which it does not see, drawn anew for each clip."""

    def __init__(self, encoder: Encoder, hidden: float) -> None:
        """Takes the fraction of patches that are hidden."""
        super().__init__()
        stem = encoder.patch_embed
        self.encoder = encoder
        self.patch_size, self.stride = stem.patch_size, stem.stride
        self.num_hidden = min(max(1, round(hidden * stem.num_patches)), stem.num_patches)
        num_cells = stem.patch_size[0] * stem.patch_size[1]
        self.decoder = nn.Sequential(nn.LayerNorm(encoder.embed_dim), nn.Linear(encoder.embed_dim, num_cells))

    def forward(self, image: Image) -> Float[Tensor, " batch"]:
        """Gives the mean squared error of each clip's hidden cells; always guessing the mean gives about 1."""
        truth = F.unfold(image, self.patch_size, stride=self.stride).transpose(1, 2)  # (batch, patch, cell)
        order = torch.rand(truth.shape[:2], device=image.device).argsort(1)  # (batch, patch)
        hidden = order.argsort(1) < self.num_hidden
        tokens, _ = self.encoder.tokens(image.masked_fill(self._cells(hidden, image), 0.0))
        guess = self.decoder(tokens[:, self.encoder.num_prefix_tokens :])  # (batch, patch, cell)
        error = (guess.float() - truth).square().mean(2)  # (batch, patch)
        return (error * hidden).sum(1) / self.num_hidden

    def no_weight_decay(self) -> set[str]:
        """Names what keeps its size."""
        return {f"encoder.{name}" for name in self.encoder.no_weight_decay()}

    def train(self, mode: bool = True) -> "MaskedPrediction":
        """Leaves no patch out, since each is to be guessed in its place."""
        super().train(mode)
        self.encoder.patchout.eval()
        return self

    def _cells(self, hidden: Hidden, image: Image) -> Bool[Tensor, "batch 1 band frame"]:
        """Gives the cells of hidden patches; of two that overlap, a hidden one hides its part of the other."""
        num_cells = self.patch_size[0] * self.patch_size[1]
        patches = hidden[:, None, :].expand(-1, num_cells, -1).to(image.dtype)  # (batch, cell, patch)
        return F.fold(patches, image.shape[2:], self.patch_size, stride=self.stride) > 0  # type: ignore[reportArgumentType]
