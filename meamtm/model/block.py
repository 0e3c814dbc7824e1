"""A transformer block that computes what is read of it, and no more."""

from jaxtyping import Bool, Float
from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor


class Block(TimmBlock):
    """timm's block.

    Where the head reads class tokens alone, the last block's other tokens are only listened to: they need keys and
    values, but no queries, no projection and no MLP, five sixths of a block's arithmetic.
    """

    def forward(  # type: ignore[reportIncompatibleMethodOverride]
        self,
        x: Float[Tensor, "batch token width"],
        attn_mask: Bool[Tensor, "batch 1 1 token"] | None = None,
        num_read: int | None = None,
    ) -> Float[Tensor, "batch read width"]:
        """Gives the first `num_read` tokens, or all."""
        x = x[:, :num_read] + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask, num_read=num_read)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
