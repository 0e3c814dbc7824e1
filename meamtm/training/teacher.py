"""A trained run -> a teacher: a model that another one learns from, beside the labels (distillation, Hinton 2015).

It has heard the same training clips and no others, so that what it knows of a held-out clip it knows from hearing
like ones."""

import json
from pathlib import Path

import torch

from meamtm.config import RunConfig, flatten, load, run_name
from meamtm.data.packed import read_card
from meamtm.errors import CheckpointError, ConfigError
from meamtm.model.transformer import AudioTransformer
from meamtm.training.checkpoint import Labels, check_origin, load_model, newest, read_record

SAME = ("data.test_fold", "data.valid_fold", "mel.sample_rate_hz")
"""Keys in which a teacher's run equals its pupil's."""


def find_teacher(config: RunConfig) -> Path | None:
    """Names the finished checkpoint that `distill.teacher` means for this run; None where nobody teaches.

    Of several runs with the same folds the one with the run's own seed teaches. Raises ConfigError where there is none,
    CheckpointError where it was taught by other data.
    """
    if config.distill.teacher == "none":
        return None
    pattern, wanted = Path(config.distill.teacher), {key: flatten(config)[key] for key in SAME}
    runs = {folder: load(folder / "config.yaml") for folder in _runs(pattern) if folder.name != run_name(config)}
    alike = {folder: run for folder, run in runs.items() if wanted.items() <= flatten(run).items()}
    same_seed = [folder for folder, run in alike.items() if run.train.seed == config.train.seed]
    chosen = same_seed or list(alike)
    if len(chosen) != 1:
        what = f"{len(chosen)} of {len(runs)} runs there have" if runs else "no run is there that has"
        remedy = f"name one of them: {', '.join(map(str, chosen[:3]))}" if chosen else "train it first"
        told = " ".join(f"{key}={json.dumps(value)}" for key, value in wanted.items())
        raise ConfigError(f"distill.teacher={pattern}: {what} {told}; {remedy}")
    folder = chosen[0]
    found = newest(folder, to_train=False)
    if found is None or read_record(found, to_train=False)["epoch"] < alike[folder].train.epochs:
        raise ConfigError(f"distill.teacher={folder} is not trained to its end; finish it first")
    card = read_card(config.data.path)
    try:
        check_origin(found, Labels(card.classes, card.multi_label, card.digest), config.data.path)
    except CheckpointError as error:
        raise CheckpointError(f"distill.teacher={folder}: {error}") from error
    return found


def teacher_config(config: RunConfig) -> RunConfig | None:
    """Gives what the teacher of this run is; None where nobody teaches."""
    found = find_teacher(config)
    return None if found is None else load(found / "config.yaml")


def load_teacher(config: RunConfig, device: torch.device) -> AudioTransformer | None:
    """Reads the model that teaches this run, which changes no more."""
    found = find_teacher(config)
    return None if found is None else load_model(found).model.requires_grad_(False).to(device)


def _runs(pattern: Path) -> list[Path]:
    """Run folders of that name; its last part may hold wildcards."""
    return [folder for folder in sorted(pattern.parent.glob(pattern.name)) if (folder / "config.yaml").exists()]
