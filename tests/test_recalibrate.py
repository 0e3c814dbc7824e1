"""Batch norm's statistics are those of clips as they are, and training is none the wiser."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import Record, local, tiny
from torch import Tensor, nn

from meamtm.data.clips import Clips
from meamtm.model.transformer import AudioTransformer
from meamtm.training.prepare import to_float, training_loader
from meamtm.training.recalibrate import recalibrate
from meamtm.training.train import train


def trained(changes: dict[str, Any], packed: Path, cache_dir: Path, folder: Path) -> tuple[dict[str, Tensor], Record]:
    """The weights that a run keeps, and what it reported."""
    record = Record()
    config = tiny(packed, cache_dir, folder, {"train.epochs": 3, **changes})
    train(config, local(config, record))
    return load_file(max(folder.rglob("model.safetensors"))), record


def test_statistics_are_those_of_all_clips_as_they_are(clips: Clips, packed: Path, cache_dir: Path) -> None:
    """Of the first norm, in one batch of whole clips, and computed from outside."""
    config = tiny(packed, cache_dir, Path("runs"), {"train.batch_size": 64, "data.clip_s": 2.5})
    chosen = np.arange(0, len(clips), 7)
    torch.manual_seed(0)
    model = AudioTransformer(config, len(clips.classes)).train()
    model.mel.fit(-8.0, 4.0)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    recalibrate(model, config, clips, chosen)
    samples = np.zeros((len(chosen), config.clip_samples), np.int16)
    for row, clip in zip(samples, chosen, strict=True):
        row[: clips.num_samples[clip]] = clips.waveform(int(clip))
    convolution, norm = model.encoder.patch_embed.stages[0][:2]  # type: ignore[reportIndexIssue]
    with torch.no_grad():
        heard = convolution(model.image(to_float(samples, torch.device("cpu")))).transpose(0, 1).flatten(1)
    torch.testing.assert_close(norm.running_mean, heard.mean(1), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(norm.running_var, heard.var(1), atol=1e-4, rtol=1e-4)
    assert model.training
    assert norm.training
    assert norm.momentum == nn.BatchNorm2d(1).momentum
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def test_as_many_ranks_as_trained_take_part(clips: Clips, packed: Path, cache_dir: Path) -> None:
    """In 8 passes through 17 clips a batch had 16; in one pass batches of 8 and 9 would leave three of 12 out."""
    config = tiny(
        packed, cache_dir, Path("runs"), {"train.batch_size": 16, "train.epoch_batches": 8, "mix.kind": "none"}
    )
    training_loader(config, clips, np.arange(17), world_size=12)
    model = AudioTransformer(config, len(clips.classes))
    norm = model.encoder.patch_embed.stages[0][1]  # type: ignore[reportIndexIssue]
    means = []
    for rank in range(12):
        recalibrate(model, config, clips, np.arange(17), rank=rank, world_size=12)
        means.append(norm.running_mean.clone())
    assert all(mean.abs().sum() > 0 for mean in means)
    assert not torch.equal(means[0], means[1]), "each rank here, without the others, hears its share alone"


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_training_is_none_the_wiser(ema_decay: float, packed: Path, cache_dir: Path, tmp_path: Path) -> None:
    changes = {"train.ema_decay": ema_decay, "data.valid_fold": 2}
    kept, record = trained(changes, packed, cache_dir, tmp_path / "with")
    plain, without = trained({**changes, "train.recalibrate": False}, packed, cache_dir, tmp_path / "without")
    assert record.column("train/loss") == without.column("train/loss")
    differing = {name.rpartition(".")[2] for name in kept if not torch.equal(kept[name], plain[name])}
    assert {"running_mean", "running_var"} <= differing <= {"running_mean", "running_var", "num_batches_tracked"}
    losses, plain_losses = record.column("valid/loss"), without.column("valid/loss")
    assert losses[:-1] == plain_losses[:-1]
    assert losses[-1] != plain_losses[-1], "what is validated last is what is kept"


def test_each_epoch_that_may_be_kept_is_validated_as_it_would_be(packed: Path, cache_dir: Path, tmp_path: Path) -> None:
    changes = {"data.valid_fold": 2, "train.keep": "best"}
    _, record = trained(changes, packed, cache_dir, tmp_path / "best")
    _, last = trained({**changes, "train.keep": "last", "train.epochs": 3}, packed, cache_dir, tmp_path / "last")
    assert record.column("valid/loss")[-1] == pytest.approx(last.column("valid/loss")[-1], abs=1e-6)
    assert record.column("valid/loss")[0] != last.column("valid/loss")[0]
