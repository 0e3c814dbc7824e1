"""Trained runs -> teachers: models from which another one learns beside the labels (distillation, Hinton 2015).

They have heard the training clips of their pupil and no others, so what they say of held-out clips was never told them.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64

from meamtm.config import RunConfig, flatten, load, run_folder, run_name
from meamtm.data.cache import open_clips
from meamtm.data.clips import Clips
from meamtm.data.split import split_clips
from meamtm.errors import CheckpointError, ConfigError, MeamtmError
from meamtm.model.transformer import AudioTransformer
from meamtm.training.checkpoint import (
    Labels,
    checkpoint_in,
    is_trained,
    load_model,
    load_state,
    newest,
    read_labels,
    read_record,
)

logger = logging.getLogger(__name__)
SHOWN = 3
OTHER_CLIPS = "was trained on other clips"


@dataclass(frozen=True)
class Teacher:
    """A model that changes no more, and which one it is."""

    model: AudioTransformer
    checkpoint: str
    digest: str
    """SHA-256 of its weights."""


def find_teachers(config: RunConfig) -> list[Path]:
    """Names the finished checkpoints that `distill.teacher` means for this run; none where nobody teaches.

    Of several that can teach it the one with the run's own seed does, or with `distill.ensemble` all do. A run that has
    begun keeps who has taught it so far, by the digests of their weights, whoever else could teach by now. Raises
    ConfigError where nobody can teach, or nothing tells who, and CheckpointError where one who has taught is gone.
    """
    if config.distill.teacher == "none":
        return []
    place = config.distill.teacher
    able, problems = _look(config)
    if not able:
        why = f" ({_some(problems)})" if problems else ""
        folds = " ".join(f"{key}={json.dumps(flatten(config)[key])}" for key in ("data.test_fold", "data.valid_fold"))
        raise ConfigError(
            f"distill.teacher={place}: no run there can teach this one{why}; train one with {folds} first"
        )
    if known := _known(config):
        return [_again(one, able, place) for one in known]
    if config.distill.ensemble:
        return [path for path, _ in able.values()]
    chosen = [path for path, seed in able.values() if seed == config.train.seed] or [path for path, _ in able.values()]
    if len(chosen) > 1:
        names = ", ".join(path.parent.name for path in chosen)
        raise ConfigError(
            f"distill.teacher={place}: {names} can each teach this run; name one of them, or set distill.ensemble=true"
        )
    return chosen


def teacher_configs(config: RunConfig) -> list[RunConfig]:
    """Gives what the teachers of this run are."""
    return [load(found / "config.yaml") for found in find_teachers(config)]


def load_teacher(checkpoint: Path, device: torch.device) -> Teacher:
    """Reads a model that teaches."""
    return Teacher(
        load_model(checkpoint).model.requires_grad_(False).to(device), str(checkpoint), _weights_digest(checkpoint)
    )


def tell_teachers(config: RunConfig, teachers: Sequence[Teacher]) -> None:
    """Says who teaches, and of an ensemble who does not for another reason than having heard other folds."""
    logger.info("taught by %s", ", ".join(teacher.checkpoint for teacher in teachers))
    if config.distill.ensemble:
        left_out = [problem for problem in _look(config)[1] if OTHER_CLIPS not in problem]
        if left_out:
            logger.warning("and not by %s", _some(left_out))


def _look(config: RunConfig) -> tuple[dict[str, tuple[Path, int]], list[str]]:
    """Gives the checkpoint and seed of each match that can teach, by the digest of its weights, and why others cannot;
    what is there twice, as a link or a copy, counts once."""
    place = Path(config.distill.teacher)
    folders = sorted(place.parent.glob(place.name)) if place.name else []
    clips = open_clips(config.data, config.mel.sample_rate_hz)
    heard = split_clips(clips, config.data).train
    able: dict[str, tuple[Path, int]] = {}
    problems: list[str] = []
    for folder in folders:
        try:
            checkpoint, teacher = _able(folder, config, clips, heard, is_named=folder == place)
            able.setdefault(_weights_digest(checkpoint), (checkpoint, teacher.train.seed))
        except MeamtmError as error:
            problems.append(f"{folder.name} {error}")
    return able, problems


def _known(config: RunConfig) -> list[dict[str, str]]:
    """Reads who has taught a run so far, if it has begun."""
    checkpoint = newest(run_folder(config))
    if checkpoint is None:
        return []
    if (known := read_record(checkpoint).get("teachers")) is not None:
        return known
    state = load_state(checkpoint)  # of an earlier version, which knew of one
    return [state["teacher"]] if "teacher" in state else []


def _again(one: Mapping[str, str], able: Mapping[str, tuple[Path, int]], place: str) -> Path:
    """Finds who taught a run so far among those that can teach it now."""
    if one["digest"] not in able:
        raise CheckpointError(
            f"distill.teacher={place}: {one['checkpoint']} has taught this run so far, and no run there has its "
            "weights now; move it back, or set another name"
        )
    return able[one["digest"]][0]


def _some(problems: Sequence[str]) -> str:
    more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    return "; ".join(problems[:SHOWN]) + more


def _weights_digest(checkpoint: Path) -> str:
    return read_record(checkpoint, to_train=False)["files"]["model.safetensors"]


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
        raise ConfigError(f"{OTHER_CLIPS} ({folds})")
    if not is_trained(checkpoint):
        raise ConfigError("is not trained to its end")
    return checkpoint, teacher
