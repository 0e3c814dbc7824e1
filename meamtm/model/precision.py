"""Config and device -> the precision of matrix products."""

import torch

from meamtm.config import RunConfig


def autocast(config: RunConfig, device: torch.device) -> torch.autocast:
    """Computes in bf16 where the config asks for it, or leaves it open and the device does so natively.

    Without native instructions bf16 is emulated: 8x slower than float32 on a CPU with AVX2 alone. Weights in bf16 are
    not kept for a second use, which none has: of AST's they would be 170 MB.
    """
    native = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
    wanted = config.train.precision == "bf16" or (config.train.precision == "auto" and native)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=wanted, cache_enabled=False)
