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
Queries = Float[Tensor, "batch head read channel"]
Mask = Bool[Tensor, "#batch 1 #read token"]
SHORT = 256
"""Tokens up to which a CPU keeps all attention weights for the way back; it reads them faster than it makes them."""
CHUNK = 2**20
"""Attention weights that a thread holds at once: 2 MB in bf16, twice, which stay in the processor's cache."""


class Attention(TimmAttention):
    """timm's self-attention, with its own choice of kernel."""

    def forward(  # type: ignore[reportIncompatibleMethodOverride]
        self, x: Float[Tensor, "batch token width"], attn_mask: Mask | None = None, num_read: int | None = None
    ) -> Float[Tensor, "batch read width"]:
        """Gives what the first `num_read` tokens, or all, take; keys where the mask is False are not heard."""
        if num_read is None:
            query, key, value = self._heads(self.qkv(x), 3).unbind(0)
        else:  # queries of the first tokens, keys and values of all
            weight, bias, width = self.qkv.weight, self.qkv.bias, self.attn_dim
            few = F.linear(x[:, :num_read], weight[:width], None if bias is None else bias[:width])
            every = F.linear(x, weight[width:], None if bias is None else bias[width:])
            (query,), (key, value) = self._heads(few, 1).unbind(0), self._heads(every, 2).unbind(0)
        heard = self.take(query, key, value, attn_mask).transpose(1, 2)  # (batch, read, head, channel)
        return self.proj(heard.flatten(2))

    def take(self, query: Queries, key: Heads, value: Heads, mask: Mask | None) -> Queries:
        """Gives what each query takes."""
        return attend(query, key, value, mask)

    def _heads(
        self, x: Float[Tensor, "batch token _"], num_parts: int
    ) -> Float[Tensor, "{num_parts} batch head token channel"]:
        """Cuts what a projection gives into queries, keys or values of each head."""
        return x.unflatten(2, (num_parts, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)


def attend(query: Queries, key: Heads, value: Heads, mask: Mask | None = None) -> Queries:
    """Gives softmax(query key' / sqrt(channel)) value.

    torch's fused kernel on CUDA, and on a CPU in float32. In bf16 on a CPU plain matrix products are faster: over all
    clips at once where there are few tokens; where there are many, a few heads at a time, which is slower than all at
    once but does not keep every weight.
    """
    in_bf16_on_a_cpu = query.device.type == "cpu" and query.dtype == torch.bfloat16
    is_short = query.shape[2] <= SHORT
    if not in_bf16_on_a_cpu or (mask is not None and not is_short) or torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    if not is_short:
        return attend_in_chunks(query, key, value)
    scores = (query * query.shape[3] ** -0.5) @ key.transpose(2, 3)  # (batch, head, read, token)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(3) @ value


def attend_in_chunks(query: Heads, key: Heads, value: Heads) -> Heads:
    """Attends a few heads at a time, so that their weights never leave the cache; they are made again on the way back
    (as in FlashAttention, Dao 2022), so memory grows with the number of tokens and not with its square."""
    scaled = query * query.shape[3] ** -0.5
    each_head = (tensor.flatten(0, 1).contiguous() for tensor in (scaled, key, value))  # (batch x head, token, channel)
    return _Chunked.apply(*each_head).view(query.shape)


class _Chunked(torch.autograd.Function):
    """Chunk after chunk works in the same two buffers."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(query, key, value)
        out = torch.empty_like(query)
        for part, scores, weights in _chunks(query):
            _weigh(query[part], key[part], scores, weights)
            torch.bmm(weights, value[part], out=out[part])
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = ctx.saved_tensors
        d_out = gradients[0].contiguous()
        d_query, d_key, d_value = (torch.empty_like(query) for _ in range(3))
        for part, scores, weights in _chunks(query):
            _weigh(query[part], key[part], scores, weights)
            torch.bmm(weights.transpose(1, 2), d_out[part], out=d_value[part])
            slopes = torch.bmm(d_out[part], value[part].transpose(1, 2), out=scores)  # of weights, and next of scores
            torch.ops.aten._softmax_backward_data.out(slopes, weights, 2, slopes.dtype, grad_input=slopes)
            torch.bmm(slopes, key[part], out=d_query[part])
            torch.bmm(slopes.transpose(1, 2), query[part], out=d_key[part])
        return d_query, d_key, d_value


def _chunks(query: Float[Tensor, "head token channel"]) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yields some heads at a time, as many for each thread, and room for two sets of their weights, which hold what the
    last chunk left. A head is one thread's work: one at a time on two threads takes a quarter longer than two."""
    num_heads, num_tokens, _num_channels = query.shape
    step = min(num_heads, torch.get_num_threads() * max(1, round(CHUNK / num_tokens**2)))
    room = query.new_empty(2, step, num_tokens, num_tokens)
    for first in range(0, num_heads, step):
        num_here = min(step, num_heads - first)
        yield slice(first, first + num_here), room[0, :num_here], room[1, :num_here]


def _weigh(query: Tensor, key: Tensor, scores: Tensor, weights: Tensor) -> None:
    torch.softmax(torch.bmm(query, key.transpose(1, 2), out=scores), 2, out=weights)
