"""Queries, keys, values -> what each token takes from the others, by the fastest way for device, precision and length.

The one place where that way is chosen, by what was measured (docs/results.md)."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from timm.layers import Attention as TimmAttention  # type: ignore[reportPrivateImportUsage]
from torch import Tensor

Heads = Float[Tensor, "batch head token channel"]
Mask = Bool[Tensor, "batch 1 1 key"]
SHORT = 256
"""Tokens up to which a CPU keeps all attention weights for the way back; it reads them faster than it makes them."""
CHUNK = 2**22
"""Attention weights that are held at once: 8 MB in bf16, which stay in the processor's cache."""


class Attention(TimmAttention):
    """timm's self-attention, with its own choice of kernel."""

    def forward(
        self, x: Float[Tensor, "batch token width"], attn_mask: Mask | None = None, is_causal: bool = False
    ) -> Float[Tensor, "batch token width"]:
        """Gives what each token takes; keys where the mask is False are not heard."""
        assert not is_causal, "sounds are heard as a whole"
        batch, num_tokens, _width = x.shape
        qkv = self.qkv(x).view(batch, num_tokens, 3, self.num_heads, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (batch, head, token, channel)
        heard = attend(query, key, value, attn_mask)
        return self.proj(heard.transpose(1, 2).reshape(batch, num_tokens, self.attn_dim))


def attend(query: Heads, key: Heads, value: Heads, mask: Mask | None = None) -> Heads:
    """Gives softmax(query key' / sqrt(channel)) value.

    torch's fused kernel on CUDA, and on a CPU in float32. In bf16 on a CPU plain matrix products are faster: over all
    clips at once where there are few tokens; where there are many, a few heads at a time, which is slower than all at
    once but does not keep every weight.
    """
    in_bf16_on_a_cpu = query.device.type == "cpu" and query.dtype == torch.bfloat16
    if mask is not None or not in_bf16_on_a_cpu or torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    if query.shape[2] <= SHORT:
        scores = (query * query.shape[3] ** -0.5) @ key.transpose(2, 3)  # (batch, head, token, token)
        return scores.softmax(3) @ value
    return _Chunked.apply(query, key, value)


class _Chunked(torch.autograd.Function):
    """Attention a few heads at a time, so that their weights never leave the cache; they are made again on the way back
    (as in FlashAttention, Dao 2022), so memory grows with the number of tokens and not with its square."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(query, key, value)
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        for part, (q, k, v) in _chunks(query, key, value):
            out.flatten(0, 1)[part] = _weights(q, k) @ v
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        saved = ctx.saved_tensors
        shape = torch.contiguous_format
        found_query, found_key, found_value = (torch.empty_like(each, memory_format=shape) for each in saved)
        d_query, d_key, d_value = (each.flatten(0, 1) for each in (found_query, found_key, found_value))
        scale = saved[0].shape[3] ** -0.5
        for part, (q, k, v, d_out) in _chunks(*saved, gradients[0]):
            weights = _weights(q, k)  # (head, token, token)
            d_value[part] = weights.transpose(1, 2) @ d_out
            d_scores = torch.ops.aten._softmax_backward_data(d_out @ v.transpose(1, 2), weights, 2, weights.dtype)
            d_query[part] = torch.bmm(d_scores, k).mul_(scale)
            d_key[part] = torch.bmm(d_scores.transpose(1, 2), q).mul_(scale)
        return found_query, found_key, found_value


def _chunks(*tensors: Heads) -> Iterator[tuple[slice, list[Float[Tensor, "part token channel"]]]]:
    num_heads, num_tokens = tensors[0].shape[:2].numel(), tensors[0].shape[2]
    step = max(1, CHUNK // num_tokens**2)
    flat = [each.flatten(0, 1) for each in tensors]  # (batch x head, token, channel)
    for first in range(0, num_heads, step):
        part = slice(first, first + step)
        yield part, [each[part] for each in flat]


def _weights(query: Tensor, key: Tensor) -> Tensor:
    return ((query * query.shape[2] ** -0.5) @ key.transpose(1, 2)).softmax(2)
