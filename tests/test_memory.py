"""The memory that is foretold is the memory that training takes."""

import json
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import tiny

from meamtm.config import RunConfig, from_flat, override
from meamtm.errors import ConfigError
from meamtm.model.precision import is_bf16
from meamtm.training import memory
from meamtm.training.memory import check_memory, memory_limit_bytes, peak_training_bytes
from meamtm.training.run import run_here

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
SMALL_AST = AST | {"encoder.heads": 6, "train.batch_size": 4}
"""Half as wide, so that what a step keeps weighs more beside the weights, and a quarter of the work."""
KINDS: dict[str, dict[str, Any]] = {
    "the default": {"train.batch_size": 16},
    "small": {"mel.hop_ms": 25, "encoder.stem_channels": [16, 32, 64, 128], "train.precision": "float32"},
    "small, in parts": {"train.accumulation_steps": 4, "train.precision": "float32"},
    "small, in parts of a clip": {"train.accumulation_steps": 32, "train.precision": "float32"},
    "guessing": {"pretrain.epochs": 1, "train.ema_decay": 0, "train.batch_size": 16, "train.precision": "float32"},
    "wide stem": {"mel.hop_ms": 25, "train.batch_size": 64, "train.precision": "float32"},
    "patches": {"encoder.stem": "patch", "encoder.depth": 6, "encoder.heads": 3},
    "ast": AST | {"train.batch_size": 2},
    "small ast, half left out": SMALL_AST | {"encoder.patchout_time": 0.5},
    "small ast, checkpointing": SMALL_AST | {"train.grad_checkpointing": True},
    "small ast, sharpness-aware": SMALL_AST | {"optim.sam_rho": 0.05},
    "ast, bf16": AST | {"train.batch_size": 2, "train.precision": "bf16"},
}
MEASURE = """
import ctypes, gc, json, sys, threading, time
import numpy as np
import torch
from meamtm.config import from_flat
from meamtm.data.cache import open_clips
from meamtm.model.transformer import AudioTransformer
from meamtm.training.heap import set_up_heap, settled_objects
from meamtm.training.prepare import TrainingBatch
from meamtm.training.recalibrate import recalibrate
from meamtm.training.step import make_learner, train_step

class Mallinfo2(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Mallinfo2

def allocated():
    heap = libc.mallinfo2()
    return heap.uordblks + heap.hblkhd

def anonymous():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))

def train(config, num_steps):
    kind = {"multi_label": False, "pretrain": config.pretrain.epochs > 0}
    learner = make_learner(config, AudioTransformer(config, 10), torch.device("cpu"), 10, **kind)
    num_clips = config.train.batch_size
    for step in range(num_steps):
        waveform = 0.1 * torch.randn(num_clips, config.clip_samples)
        train_step(learner, TrainingBatch(waveform, torch.eye(10)[torch.arange(num_clips) % 10], None, num_clips, step))
    clips = open_clips(config.data, config.mel.sample_rate_hz)
    recalibrate(learner.evaluated, config, clips, np.arange(32))

def peak(config):
    train(config, 1)  # what libraries take once for each shape: oneDNN's kernels for Muon's products in bf16 are 50 MB
    gc.collect()
    before, seen, ended = allocated(), [], threading.Event()
    def watch():
        while not ended.is_set():
            seen.append(allocated())
            time.sleep(0.001)
    watcher = threading.Thread(target=watch)
    watcher.start()
    train(config, 2)
    ended.set()
    watcher.join()
    return max(seen) - before

set_up_heap(sparing=False)
kinds = json.loads(sys.argv[1])
peaks = {kind: peak(from_flat(flat)) for kind, flat in kinds.items()}
held = anonymous()
with settled_objects():
    print(json.dumps({"peaks": peaks, "held": held, "settled": anonymous(), "allocated": allocated()}))
"""


@pytest.fixture(scope="module")
def measured(packed: Path, cache_dir: Path) -> dict[str, Any]:
    """What one process takes that trains a model of each kind, one after the other."""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("asks glibc what is allocated")
    native = torch.cpu._is_avx512_bf16_supported()
    places = {"data.path": str(packed), "data.cache_dir": str(cache_dir)}
    kinds = {kind: flat | places for kind, flat in KINDS.items() if native or flat.get("train.precision") != "bf16"}
    command = [sys.executable, "-c", MEASURE, json.dumps(kinds)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.slow
def test_the_peak_is_foretold_within_a_tenth(measured: dict[str, Any]) -> None:
    assert len(measured["peaks"]) >= 6
    foretold = {kind: peak_training_bytes(from_flat(KINDS[kind])) for kind in measured["peaks"]}
    assert foretold == pytest.approx(measured["peaks"], rel=0.1)


@pytest.mark.slow
def test_a_process_that_has_trained_gives_its_memory_back(measured: dict[str, Any]) -> None:
    assert measured["held"] > measured["allocated"] + 0.5 * max(measured["peaks"].values())
    assert measured["settled"] < measured["held"] - 0.5 * max(measured["peaks"].values())


def test_the_collector_leaves_alone_what_was_there_before_training() -> None:
    """While it lasts, or for good where a process does nothing else; what training leaves is collected either way."""
    script = """
import gc, weakref
from meamtm.training.heap import settle_for_good, settled_objects

class Model:
    def __init__(self):
        self.itself = self

def train():
    with settled_objects():
        return weakref.ref(Model()), gc.get_freeze_count()

left, while_training = train()
gc.collect()
print(while_training > 1_000, gc.get_freeze_count(), left())
settle_for_good()
left, while_training = train()
settle_for_good()
train()
print(while_training > 1_000, gc.get_freeze_count() > 1_000, left())
"""
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert told.splitlines() == ["True 0 None", "True True None"]


@pytest.mark.parametrize("kind", ["small, in parts", "guessing", "small ast, sharpness-aware"])
def test_what_takes_no_memory_is_counted_once(kind: str) -> None:
    config = from_flat(KINDS[kind])
    other = {
        "name": "other",
        "optim.lr": 3e-4,
        "train.seed": 1,
        "train.epochs": 7,
        "mix.kind": "none",
        "data.test_fold": 3,
    }
    once = peak_training_bytes(config)
    count = memory._peak_bytes
    assert once == count.__wrapped__(config, 10, torch.device("cpu"), ())  # type: ignore[reportFunctionMemberAccess]
    num_counted = count.cache_info().misses
    assert peak_training_bytes(override(config, other)) == once
    assert count.cache_info().misses == num_counted
    assert peak_training_bytes(override(config, {"train.batch_size": 5})) != once


def test_training_that_cannot_fit_is_refused_before_it_starts(packed: Path, cache_dir: Path, tmp_path: Path) -> None:
    changes = {"encoder.depth": 48, "encoder.heads": 64, "encoder.head_dim": 64}
    with pytest.raises(
        ConfigError,
        match=r"train.batch_size=20 takes [\d,.]+ GB at training's peak, and there are [\d.]+ GB; lower it, raise "
        r"train.accumulation_steps or scale.workers, or set train.grad_checkpointing=true",
    ):
        run_here(tiny(packed, cache_dir, tmp_path, changes))
    assert not any(tmp_path.iterdir())


def test_of_a_gpu_a_run_counts_on_its_share(
    packed: Path, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, device = tiny(packed, cache_dir, tmp_path), torch.device("cuda")
    gpu = SimpleNamespace(total_memory=3 * peak_training_bytes(config, 10, device))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    check_memory(config, device)
    with pytest.raises(ConfigError, match=r"train\.batch_size=20 takes"):
        check_memory(override(config, {"scale.gpus_per_worker": 0.25}), device)


def test_a_batch_of_several_passes_is_counted_whole(
    packed: Path, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 80 training clips a batch holds 80, and where an epoch has eight batches of several passes 512."""
    one, eight = (
        tiny(packed, cache_dir, tmp_path, {"train.batch_size": 512, "train.epoch_batches": num}) for num in (1, 8)
    )
    few, many = (peak_training_bytes(override(one, {"train.batch_size": size})) for size in (80, 512))
    monkeypatch.setattr(memory, "memory_limit_bytes", lambda _: (few + many) // 2)
    check_memory(one, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"train\.batch_size=512 takes"):
        check_memory(eight, torch.device("cpu"))


def test_a_gpu_that_emulates_bf16_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch answers for a T4."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not is_bf16(RunConfig(), torch.device("cuda"))


@pytest.mark.parametrize(
    ("mine", "files", "limit"),
    [
        ("0::/a/b", {"memory.max": "max", "a/memory.max": "3000", "a/b/memory.max": "5000"}, 3_000),
        ("7:cpu:/x\n4:memory:/job/1", {"memory/job/memory.limit_in_bytes": "4096"}, 4_096),
        ("0::/seen from outside", {"memory.max": "2048"}, 2_048),
    ],
    ids=["version 2", "version 1", "in a container"],
)
def test_a_containers_limit_is_the_memory_there_is(
    tmp_path: Path, mine: str, files: dict[str, str], limit: int
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    (tmp_path / "mine").write_text(f"{mine}\n")
    assert memory_limit_bytes(tmp_path, tmp_path / "mine") == limit
    assert memory_limit_bytes(tmp_path, tmp_path / "none") > 1 << 30, "the machine's own"
