"""The same numbers from the same seed, also where a GPU adds in any order it likes."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from meamtm.errors import ConfigError


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Has torch take deterministic kernels while the block runs; ConfigError for an operation that has none.

    A warning in its place would leave torch's fused attention on a GPU as it is, which adds in any order. A CPU
    computes the same without all this, on as many threads as before.
    """
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
    memory: Any = torch.utils.deterministic  # modules whose attributes are properties
    cudnn: Any = torch.backends.cudnn
    was_on, was_lenient = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    filled, tried = memory.fill_uninitialized_memory, cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False  # we read nothing that was not written
    cudnn.benchmark = False  # another run might find another kernel the fastest
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        problem = str(error).partition(".")[0]
        raise ConfigError(f"train.deterministic=true: {problem}; set it to false, or use another setting") from error
    finally:
        torch.use_deterministic_algorithms(was_on, warn_only=was_lenient)
        memory.fill_uninitialized_memory, cudnn.benchmark = filled, tried
