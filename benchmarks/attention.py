"""Ways to compute attention, forward and backward, by length and precision: `meamtm.model.attention` chooses by these.

Heads of 64 channels. `plain` keeps every weight for the way back, `in chunks` computes them again a few heads at a
time (bf16 alone), `fused` is torch's kernel, `meamtm` what is chosen. Run it from the repository root:

    python benchmarks/attention.py [--processes 3] [--threads 2]
"""

import argparse
import os
from typing import Any

from contest import AbsentError, Contender, Work, contest

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as in meamtm.screen; torch reads it when it is loaded
SHAPES = ((32, 4, 48), (32, 4, 128), (32, 3, 248), (8, 12, 607), (4, 12, 1_214))


def way(name: str) -> Contender:
    def contender(case: dict[str, Any]) -> Work:
        import torch
        import torch.nn.functional as F

        from meamtm.model import attention
        from meamtm.training.heap import set_up_heap

        def plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            return ((query * query.shape[3] ** -0.5) @ key.transpose(2, 3)).softmax(3) @ value

        if name == "in chunks" and case["dtype"] != "bfloat16":
            raise AbsentError("made for bf16")
        attend = {
            "meamtm": attention.attend,
            "plain": plain,
            "in chunks": attention.attend_in_chunks,
            "fused": F.scaled_dot_product_attention,
        }[name]
        set_up_heap(sparing=False)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        batch, heads, tokens = case["shape"]
        shape = (batch, tokens, 3, heads, 64)
        qkv = torch.randn(shape, dtype=getattr(torch, case["dtype"]), device=device, requires_grad=True)
        upstream = torch.ones(batch, heads, tokens, 64, dtype=qkv.dtype, device=device)

        def work() -> None:
            attend(*qkv.permute(2, 0, 3, 1, 4).unbind(0)).backward(upstream)

        return work

    return contender


CONTENDERS = {name: way(name) for name in ("meamtm", "plain", "in chunks", "fused")}
CASES = {
    f"{dtype}, {' x '.join(map(str, shape))}": {"dtype": dtype, "shape": shape}
    for dtype in ("bfloat16", "float32")
    for shape in SHAPES
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(processes=3, measure_s=1.0, threads=len(os.sched_getaffinity(0)))


if __name__ == "__main__":
    contest(__file__, CONTENDERS, CASES, reference="meamtm", add_arguments=add_arguments)
