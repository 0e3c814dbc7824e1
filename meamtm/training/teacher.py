"""Trained runs -> teachers: models from which another one learns beside the labels (distillation, Hinton 2015).

They have heard the training clips of their pupil and no others, so what they say of held-out clips was never told them.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64

from meamtm.config import RunConfig, flatten, load, run_name
from meamtm.data.cache import open_clips
from meamtm.data.clips import Clips
from meamtm.data.split import split_clips
from meamtm.errors import ConfigError, MeamtmError
from meamtm.model.transformer import AudioTransformer
from meamtm.training.checkpoint import Labels, checkpoint_in, is_trained, load_model, read_labels, read_record

SHOWN = 3


@dataclass(frozen=True)
class Teacher:
    """A model that changes no more, and which one it is."""

    model: AudioTransformer
    checkpoint: str
    digest: str
    """SHA-256 of its weights."""


def find_teachers(config: RunConfig) -> list[Path]:
    """Names the finished checkpoints that `distill.teacher` means for this run; none where nobody teaches.

    Of several that can teach it the one with the run's own seed does, or with `distill.ensemble` all do. Raises
    ConfigError where there is none, or nothing tells which.
    """
    if config.distill.teacher == "none":
        return []
    place = Path(config.distill.teacher)
    folders = sorted(place.parent.glob(place.name)) if place.name else []
    clips = open_clips(config.data, config.mel.sample_rate_hz)
    heard = split_clips(clips, config.data).train
    able: dict[Path, int] = {}
    problems: list[str] = []
    for folder in folders:
        try:
            checkpoint, teacher = _able(folder, config, clips, heard, is_named=folder == place)
            able[checkpoint] = teacher.train.seed
        except MeamtmError as error:
            problems.append(f"{folder.name} {error}")
    if able and config.distill.ensemble:
        return list(able)
    chosen = [path for path, seed in able.items() if seed == config.train.seed] or list(able)
    if len(chosen) == 1:
        return chosen
    if chosen:
        names = ", ".join(path.parent.name for path in chosen)
        raise ConfigError(
            f"distill.teacher={place}: {names} can each teach this run; name one of them, or set distill.ensemble=true"
        )
    more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    why = f" ({'; '.join(problems[:SHOWN])}{more})" if problems else ""
    folds = " ".join(f"{key}={flatten(config)[key] or 'null'}" for key in ("data.test_fold", "data.valid_fold"))
    raise ConfigError(f"distill.teacher={place}: no run there can teach this one{why}; train one with {folds} first")


def teacher_configs(config: RunConfig) -> list[RunConfig]:
    """Gives what the teachers of this run are."""
    return [load(found / "config.yaml") for found in find_teachers(config)]


def load_teachers(config: RunConfig, device: torch.device) -> tuple[Teacher, ...]:
    """Reads the models that teach this run."""
    return tuple(_load(found, device) for found in find_teachers(config))


def _load(found: Path, device: torch.device) -> Teacher:
    digest = read_record(found, to_train=False)["files"]["model.safetensors"]
    return Teacher(load_model(found).model.requires_grad_(False).to(device), str(found), digest)


def _able(
    folder: Path, config: RunConfig, clips: Clips, heard: Int64[np.ndarray, " train"], *, is_named: bool
) -> tuple[Path, RunConfig]:
    """Gives a run's newest checkpoint and its config; raises where it cannot teach, with the reason.

    Pupils and results of a cross-validation match a pattern too, since they have the name of their config."""
    checkpoint = checkpoint_in(folder)
    if checkpoint is None:
        raise ConfigError("has no checkpoint")
    teacher = load(checkpoint / "config.yaml")
    if folder.name == run_name(config):
        raise ConfigError("is this run itself")
    if teacher.distill.teacher != "none" and not is_named:
        raise ConfigError("was taught itself, and is not named")
    if teacher.mel.sample_rate_hz != config.mel.sample_rate_hz:
        raise ConfigError(f"has mel.sample_rate_hz={teacher.mel.sample_rate_hz}, not {config.mel.sample_rate_hz}")
    if read_labels(checkpoint) != Labels(clips.classes, clips.multi_label, clips.digest):
        raise ConfigError(f"was trained on other data than {config.data.path}")
    if not np.array_equal(split_clips(clips, teacher.data).train, heard):
        folds = f"data.test_fold={teacher.data.test_fold} data.valid_fold={teacher.data.valid_fold}"
        raise ConfigError(f"was trained on other clips ({folds})")
    if not is_trained(checkpoint):
        raise ConfigError("is not trained to its end")
    return checkpoint, teacher
