"""The memory that is foretold is the memory that training takes."""

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from meamtm.config import from_flat
from meamtm.model.memory import peak_training_bytes

AST = {
    "encoder.stem": "patch",
    "encoder.stride": [10, 10],
    "encoder.heads": 12,
    "encoder.depth": 4,
    "encoder.mlp_ratio": 4.0,
    "encoder.pool": "cls_dist",
    "mel.kind": "kaldi",
    "mel.num_bands": 128,
    "mel.window_ms": 25,
    "mel.hop_ms": 10,
    "mel.fmin_hz": 20,
    "data.clip_s": 5.0,
    "train.precision": "float32",
}
KINDS: dict[str, dict[str, Any]] = {
    "wide stem": {"mel.hop_ms": 25, "train.batch_size": 64, "train.precision": "float32"},
    "ast checkpointing": AST | {"train.batch_size": 4, "train.grad_checkpointing": True},
    "ast bf16": AST | {"train.batch_size": 2, "train.precision": "bf16"},
}
"""Hundreds of megabytes each; small models take up to half as much again by the heap's fragments (docs/log.md)."""
MEASURE = """
import json, sys
import torch
from meamtm.config import from_flat
from meamtm.model.transformer import AudioTransformer
from meamtm.training.prepare import TrainingBatch
from meamtm.training.step import make_learner, train_step

def status(key):
    line = next(line for line in open("/proc/self/status") if line.startswith(key))
    return 1024 * int(line.split()[1])

def train(config, num_steps):
    learner = make_learner(config, AudioTransformer(config, 10), torch.device("cpu"), 10, multi_label=False)
    num_clips = config.train.batch_size
    for step in range(num_steps):
        waveform = 0.1 * torch.randn(num_clips, config.clip_samples)
        train_step(learner, TrainingBatch(waveform, torch.eye(10)[torch.arange(num_clips) % 10], None, num_clips, step))

flat = json.loads(sys.argv[1])
train(from_flat({"train.batch_size": 2, "encoder.depth": 1, "encoder.stem_channels": [8], "data.clip_s": 0.5,
                 "train.precision": flat.get("train.precision", "auto")}), 1)  # what libraries take once
before = status("VmRSS")
train(from_flat(flat), 2)
print(status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("kind", KINDS)
def test_the_peak_is_foretold_within_a_fifth(kind: str) -> None:
    if KINDS[kind].get("train.precision") == "bf16" and not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("this processor emulates bf16, which takes minutes")
    command = [sys.executable, "-c", MEASURE, json.dumps(KINDS[kind])]
    measured = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert peak_training_bytes(from_flat(KINDS[kind])) == pytest.approx(measured, rel=0.2)
