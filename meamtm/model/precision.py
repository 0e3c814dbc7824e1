"""Config and device -> the precision of matrix products."""

import torch

from meamtm.config import RunConfig


def is_bf16(config: RunConfig, device: torch.device) -> bool:
    """Tells whether to compute in bf16: the config asks for it, or leaves it open and the device does so natively.

    Without native instructions bf16 is emulated: 8x slower than float32 on a CPU with AVX2 alone, and 80x in single
    products; GPUs before Ampere (V100, T4) emulate it too.
    """
    if config.train.precision != "auto":
        return config.train.precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()


def autocast(config: RunConfig, device: torch.device) -> torch.autocast:
    """Computes in bf16 where `is_bf16`.

    Weights in bf16 are not kept for a second use, which none has: of AST's they would be 170 MB.
    """
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=is_bf16(config, device), cache_enabled=False)
