"""Batches of clips -> augmented, mixed and masked tensors on the device.

No thread works ahead: it would take cores from the matrix products, and cost more than it hides (docs/log.md)."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int16, Int64
from torch import Tensor

from meamtm.config import RunConfig
from meamtm.data.audio import FULL_SCALE
from meamtm.data.clips import Clips
from meamtm.data.loader import Batch, Loader
from meamtm.errors import ConfigError
from meamtm.training.augment import augment_waveform, mix, spectrogram_mask


@dataclass(frozen=True)
class TrainingBatch:
    """One rank's part of a global batch of `num_global` clips, as the model will hear it."""

    waveform: Float[Tensor, "batch time"]
    target: Float[Tensor, "batch label"]
    mask: Bool[Tensor, "batch band frame"] | None
    num_global: int
    seed: int
    """Of all that is random in the step itself."""
    teacher_logits: Float[Tensor, "batch label"] | None = None
    """What another model says of the clips, where one teaches."""


def training_loader(
    config: RunConfig, clips: Clips, indices: Int64[np.ndarray, " index"], *, rank: int = 0, world_size: int = 1
) -> Loader:
    """Deals a run's training clips; raises ConfigError or DataError where they do not go round."""
    loader = Loader(
        clips,
        indices,
        config.clip_samples,
        config.train.batch_size,
        seed=config.train.seed,
        train=True,
        least_batches=config.train.epoch_batches,
        rank=rank,
        world_size=world_size,
    )
    if config.mix.kind != "none" and config.mix.prob > 0 and config.train.batch_size < 2 * world_size:
        raise ConfigError(
            f"train.batch_size={config.train.batch_size} gives a worker one clip at a time, and "
            f"mix.kind={config.mix.kind} mixes two of its own; raise train.batch_size to {2 * world_size} or more, "
            "or set mix.kind=none"
        )
    return loader


def training_batches(
    loader: Loader, config: RunConfig, device: torch.device, *, epoch: int, start: int = 0, rank: int = 0
) -> Iterator[TrainingBatch]:
    """Yields the batches of an epoch from number `start` on.

    What is random comes from (seed, epoch, batch, rank) alone, so a resumed run needs no random state.
    """
    until = round(config.mix.until * config.train.epochs, 6)  # 0.14 x 50 are 7.000000000000001
    mixed = epoch < config.pretrain.epochs + until
    for number, batch in enumerate(loader.epoch(epoch, start), start):
        yield prepare(batch, config, device, step_seed(config.train.seed, epoch, number, rank), mixed=mixed)


def prepare(batch: Batch, config: RunConfig, device: torch.device, seed: int, *, mixed: bool = True) -> TrainingBatch:
    """Augments, mixes and masks one batch."""
    generator = torch.Generator().manual_seed(seed)
    samples = torch.from_numpy(batch.waveform).to(device)  # 16 bits each on their way
    target = torch.from_numpy(batch.target).to(device)
    waveform = augment_waveform(samples, config.augment, generator)
    if mixed:
        waveform, target = mix(waveform, target, config.mix, config.mel, generator)
    size = (len(waveform), config.mel.num_bands, config.num_frames)
    mask = spectrogram_mask(size, config.augment, generator)
    return TrainingBatch(waveform, target, None if mask is None else mask.to(device), batch.num_global, seed)


def to_float(waveform: Int16[np.ndarray, "batch time"], device: torch.device) -> Float[Tensor, "batch time"]:
    """Moves 16-bit samples to the device and brings them to -1..1 there."""
    return torch.from_numpy(waveform).to(device).float().mul_(1 / FULL_SCALE)


def step_seed(seed: int, epoch: int, batch: int, rank: int) -> int:
    """Mixes four numbers into a seed that is unlike its neighbours'."""
    return int(np.random.SeedSequence((seed, epoch, batch, rank)).generate_state(1, np.uint64)[0] >> np.uint64(1))
