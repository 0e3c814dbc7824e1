"""torch.compile and torch.export take the whole way from waveforms to logits, for any number of clips of any length."""

import json
import shutil
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim

from meamtm.config import from_flat
from meamtm.model.transformer import AudioTransformer

SMALL = {
    "data.clip_s": 1.0,
    "mel.sample_rate_hz": 8_000,
    "mel.num_bands": 32,
    "encoder.stem_channels": [8, 16],
    "encoder.heads": 2,
    "encoder.head_dim": 16,
    "encoder.depth": 1,
    "encoder.patch": [16, 16],
    "encoder.stride": [10, 10],
}
KINDS: dict[str, dict[str, Any]] = {
    "conv": {"mel.backend": "conv", "encoder.pool": "attention", "encoder.positions": "separate"},
    "ast": {
        "mel.kind": "kaldi",
        "mel.num_bands": 24,
        "mel.window_ms": 25,
        "mel.hop_ms": 10,
        "encoder.stem": "patch",
        "encoder.pool": "cls_dist",
    },
    "locality": {"mel.hop_ms": 10, "encoder.attention": "locality", "encoder.stem": "shifted_patch"},
    "separable": {"encoder.attention": "separable", "encoder.depth": 2},
}
SIZES = [(2, 8_000), (5, 4_321), (1, 12_345), (3, 30_000)]
"""Clips and samples: as trained, shorter, alone and longer, and much longer."""


def model(kind: str) -> AudioTransformer:
    torch.manual_seed(0)
    made = AudioTransformer(from_flat(SMALL | KINDS[kind]), 5).eval()
    for weight in made.encoder.head.parameters():  # which begins at zero
        torch.nn.init.normal_(weight)
    return made


def noise(num_clips: int, num_samples: int) -> Tensor:
    return 0.1 * torch.randn(num_clips, num_samples, generator=torch.Generator().manual_seed(num_samples))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_an_exported_model_equals_the_model(kind: str) -> None:
    made = model(kind)
    dynamic = {"waveform": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}}
    exported = torch.export.export(made, (noise(2, 8_000),), dynamic_shapes=dynamic).module()
    for size in SIZES:
        torch.testing.assert_close(exported(noise(*size)), made(noise(*size)), atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("conv", {"options": {"cpp.simdlen": 1}}),  # without vectors, which takes a quarter less time
        ("ast", {"backend": "aot_eager"}),  # the same graph, of which no C++ is made: a third of the time
        *(pytest.param(kind, {}, marks=pytest.mark.soak) for kind in KINDS),  # as users call it
    ],
)
def test_a_compiled_model_equals_the_model(kind: str, how: dict[str, Any]) -> None:
    """In a process of its own: the types that tests check would be compiled too, and take as long as the model."""
    words = [sys.executable, __file__, kind, json.dumps(how)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [list(size) for size in SIZES[:2]]


@torch.no_grad()
def compare(kind: str, how: dict[str, Any]) -> list[tuple[int, int]]:
    """Compares a compiled model with the model, and gives the sizes that it was done for."""
    made, done = model(kind), []
    compiled = torch.compile(made, dynamic=True, **how)
    for size in SIZES[:2]:  # one clip alone would be compiled anew
        torch.testing.assert_close(compiled(noise(*size)), made(noise(*size)), atol=1e-4, rtol=0)
        done.append(size)
    return done


if __name__ == "__main__":
    sys.stdout.write(json.dumps(compare(sys.argv[1], json.loads(sys.argv[2]))))
