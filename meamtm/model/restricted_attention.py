"""Self-attention that is kept from some tokens: from a token's own, or from all that lie along the other axis."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from meamtm.model.attention import Attention, Heads, Queries, attend

Tokens = Float[Tensor, "batch token width"]
Heard = Bool[Tensor, "batch 1 1 token"]


class LocalityAttention(Attention):
    """Locality self-attention (Lee 2021, section 3.2): no token hears itself, so each has to look at others, and a
    learnt temperature for each head lets it look at few of them."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.inverse_temperature = nn.Parameter(torch.ones(self.num_heads))  # of scores over sqrt(channel)

    def take(self, query: Queries, key: Heads, value: Heads, mask: Heard | None) -> Queries:
        """Gives what each query takes from the others; where there are none, from itself."""
        itself = torch.eye(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
        heard = torch.ones_like(itself)[None, None] if mask is None else mask
        others = heard & ~itself  # (batch or 1, 1, read, token)
        others = others | (heard & ~others.any(3, keepdim=True))
        return attend(query * self.inverse_temperature[:, None, None].to(query.dtype), key, value, others)


class SeparableAttention(Attention):
    """Attends along one axis of the grid of patches, as SepTr does (Ristea 2022, without its tokens for each column;
    axial attention, Ho 2019): to all frequencies of a patch's own time, or to all times of its own frequency."""

    num_rows = 1
    along_time = True

    def forward(self, x: Tokens, attn_mask: Heard | None = None, num_read: int | None = None) -> Tokens:
        """Takes all patches, row by row, and nothing else; columns that the mask tells are padding hear each other."""
        assert num_read is None
        grid = x.unflatten(1, (self.num_rows, -1))  # (batch, row, column, width)
        if not self.along_time:
            columns = grid.transpose(1, 2).contiguous()  # or an exported model would refuse a clip alone
            heard = super().forward(columns.flatten(0, 1)).unflatten(0, columns.shape[:2])
            return heard.transpose(1, 2).contiguous().flatten(1, 2)
        mask = None if attn_mask is None else attn_mask[..., : grid.shape[2]].repeat_interleave(self.num_rows, 0)
        return super().forward(grid.flatten(0, 1), mask).unflatten(0, grid.shape[:2]).flatten(1, 2)
