"""A run small enough to train within a second, and its plain context."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from meamtm.config import RunConfig, from_flat, run_folder
from meamtm.training.context import LocalContext

TINY = {
    "data.clip_s": 0.5,
    "mel.sample_rate_hz": 8_000,
    "mel.num_bands": 16,
    "mel.hop_ms": 20.0,
    "encoder.stem_channels": [8, 16],
    "encoder.heads": 2,
    "encoder.head_dim": 8,
    "encoder.depth": 1,
    "optim.name": "adamw",  # cheaper than Muon for so small a model
    "optim.lr": 3e-3,
    "train.epochs": 4,
    "train.epoch_batches": 1,
    "train.batch_size": 20,
    "train.checkpoint_s": 0,
    "train.precision": "float32",
    "scale.threads": 1,
    "tracking.mlflow": False,
}
PLAIN = {
    "augment.roll": 0,
    "augment.gain_db": 0,
    "augment.speed": 0,
    "augment.time_mask": 0,
    "augment.freq_mask": 0,
    "mix.kind": "none",
    "encoder.drop_path": 0,
}
"""Nothing is drawn at random during a step."""


def tiny(packed: Path, cache_dir: Path, runs_dir: Path, changes: Mapping[str, Any] | None = None) -> RunConfig:
    """The tiny run on a packed set, with its folders, and with some keys changed."""
    places = {"data.path": str(packed), "data.cache_dir": str(cache_dir), "runs_dir": str(runs_dir)}
    return from_flat({**TINY, **places, **(changes or {})})


class Record:
    """A sink that keeps what it is told."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def start(self, params: Mapping[str, Any], tags: Mapping[str, str], from_step: int = 0) -> None:
        """Has nothing to prepare."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Keeps a row."""
        self.rows.append({"step": step, **metrics})

    def artifact(self, path: Path, folder: str = "") -> None:
        """Keeps no files."""

    def close(self, status: str = "FINISHED") -> None:
        """Ends nothing."""

    def column(self, key: str) -> list[float]:
        """One metric, row by row."""
        return [row[key] for row in self.rows]


def local(config: RunConfig, *sinks: Any, **more: Any) -> LocalContext:
    """A plain process's context in the run's own folder, on the CPU."""
    return LocalContext(run_folder(config), torch.device("cpu"), sinks, **more)
