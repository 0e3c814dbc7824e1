"""A checkpoint and a data set -> honest numbers. Nothing else ever reads the test fold."""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from meamtm.config import RunConfig, data_name, flatten, override
from meamtm.data.cache import open_clips
from meamtm.data.clips import Clips
from meamtm.data.loader import Loader
from meamtm.data.packed import Card, digest_of, read_card
from meamtm.data.split import held_out, split_clips
from meamtm.errors import CheckpointError, DataError, MeamtmError
from meamtm.model.precision import autocast
from meamtm.model.transformer import AudioTransformer
from meamtm.training.checkpoint import Saved, load_model
from meamtm.training.context import choose_device
from meamtm.training.metrics import confusion, scores
from meamtm.training.prepare import to_float

logger = logging.getLogger(__name__)
OF_A_PLACE = ("data.path", "data.cache", "data.cache_dir", "scale.device")
"""Keys of what may differ between the machine that trained and the one that tests."""


@dataclass(frozen=True)
class Evaluation:
    """What a checkpoint does on clips that it has never met."""

    checkpoint: Path
    part: str
    """Which clips these are: of a fold, of the data set's own split, or all."""
    digest: str
    """Of the data set that they are from."""
    classes: tuple[str, ...]
    metrics: dict[str, float]
    clip_ids: tuple[str, ...]
    probability: NDArray[np.float32]
    """(clip, label)"""
    target: NDArray[np.float32]
    """(clip, label)"""
    confusion: NDArray[np.int64] | None
    """(true label, named label); None where clips have several labels"""

    @property
    def score(self) -> float:
        """The metric that counts: mean average precision where clips have several labels, accuracy elsewhere."""
        return self.metrics["test/map" if self.confusion is None else "test/accuracy"]


def evaluate(
    checkpoint: Path, data_path: str | None = None, fold: int | None = None, *, here: RunConfig | None = None
) -> Evaluation:
    """Tests a checkpoint on its test fold, on its validation fold or on another data set.

    Raises DataError for clips that trained it, or chose its epoch (`train.keep=best`). Of a data set that it was not
    trained on, every clip is used unless a fold is named. Labels are in the checkpoint's order, whatever the data set's
    is. `here` says where the run's data lie and what computes now, since a run may have been moved after it was
    trained; without it the data lie where they did.
    """
    saved = load_model(checkpoint)
    changes = {} if here is None else {key: flatten(here)[key] for key in OF_A_PLACE}
    if changes.get("scale.device") != "cpu":
        changes["scale.device"] = "auto"  # where Ray's workers had a GPU, the process that tests may have none
    if data_path is not None:
        changes["data.path"] = data_path
    if fold is not None:
        changes |= {"data.test_fold": fold, "data.valid_fold": None}
    config = override(saved.config, changes)
    card = _card(config.data.path, is_given=data_path is not None)
    _check_data(saved, card, config.data.path, is_given=data_path is not None)
    clips = open_clips(config.data, config.mel.sample_rate_hz)
    is_foreign = card.digest != saved.labels.digest
    if clips.has_split and fold is not None:
        raise DataError(
            f"--fold={fold}: {config.data.path} has a split of its own, so folds decide nothing; leave --fold out"
        )
    if is_foreign:  # nothing trains on it, so it need not have every class elsewhere
        indices = np.arange(len(clips)) if fold is None else held_out(clips, config.data)
    else:
        indices = split_clips(clips, config.data).test
    if len(indices) == 0 and clips.has_split:
        raise DataError(f"data.path={config.data.path}: no clip of its split is for testing; name other data by --data")
    if len(indices) == 0:
        raise DataError(f"data.test_fold={config.data.test_fold}: no clip is held out; name other data by --data")
    if fold is not None or is_foreign:
        _check_unheard(saved, clips, indices, f"--data={config.data.path}" if fold is None else f"--fold={fold}")
    model, multi_label = saved.model.to(choose_device(config.scale)), saved.labels.multi_label
    probability, target = classify(model, config, clips, indices, multi_label=multi_label)
    classes = saved.labels.classes
    target = target[:, [clips.classes.index(name) for name in classes]]  # another data set may order them otherwise
    return Evaluation(
        checkpoint=saved.folder,
        part=_part(clips, config, is_whole=is_foreign and fold is None),
        digest=card.digest,
        classes=classes,
        metrics={f"test/{key}": value for key, value in scores(probability, target, multi_label=multi_label).items()},
        clip_ids=tuple(np.array(clips.ids)[indices]),
        probability=probability.numpy(),
        target=target.numpy(),
        confusion=None if multi_label else confusion(probability, target).numpy(),
    )


def _card(path: str, *, is_given: bool) -> Card:
    try:
        return read_card(path)
    except DataError as error:
        if is_given:
            raise
        raise DataError(f"{error}, or name where the data are by now with --data") from error


def _part(clips: Clips, config: RunConfig, *, is_whole: bool) -> str:
    if is_whole:
        return "all clips"
    return "its own split" if clips.has_split else f"fold {config.data.test_fold}"


def _check_unheard(saved: Saved, clips: Clips, indices: NDArray[np.int64], asked: str) -> None:
    """Refuses clips that trained the model or chose its epoch, which it names better than any that it never heard."""
    if (num_heard := _count_heard(saved, clips, indices)) > 0:
        data, chose = saved.config.data, saved.config.train.keep == "best"
        held_out = [each for each in (data.test_fold, None if chose else data.valid_fold) if each is not None]
        did = f"trained {saved.folder}" + (" or chose its epoch" if chose else "")
        remedy = f"its own is {' or '.join(map(str, held_out))}" if held_out else "none was held out"
        raise DataError(
            f"{asked}: {num_heard} of its {len(indices)} clips {did}, so this would be no test; "
            f"name a fold that it never heard ({remedy}), or other data by --data"
        )


def _count_heard(saved: Saved, clips: Clips, indices: NDArray[np.int64]) -> int:
    """Counts clips that trained the model or chose its epoch. In another data set these are clips of the same samples,
    which can be told while the set that trained it is where it was."""
    if clips.digest == saved.labels.digest:
        return len(np.intersect1d(indices, _heard_by(saved, clips)))
    if not _is_there(saved):
        logger.warning(
            "data.path=%s: what %s was trained on is not there any more, so nobody can tell whether it has heard "
            "any of these clips; this is a test only if it has not",
            saved.config.data.path,
            saved.folder,
        )
        return 0
    own = open_clips(saved.config.data, saved.config.mel.sample_rate_hz)
    known = _heard_by(saved, own)
    like_these = known[np.isin(own.num_samples[known], clips.num_samples[indices])]
    heard = {_samples(own, clip) for clip in like_these.tolist()}
    return sum(_samples(clips, clip) in heard for clip in indices.tolist())


def _heard_by(saved: Saved, clips: Clips) -> NDArray[np.int64]:
    split = split_clips(clips, saved.config.data)
    return np.union1d(split.train, split.valid) if saved.config.train.keep == "best" else split.train


def _samples(clips: Clips, clip: int) -> bytes:
    return hashlib.sha256(clips.waveform(clip).tobytes()).digest()


def _is_there(saved: Saved) -> bool:
    """Whether the data set that trained the model is still where it was, and still the same."""
    return digest_of(saved.config.data.path) == saved.labels.digest


def _check_data(saved: Saved, card: Card, path: str, *, is_given: bool) -> None:
    """Refuses other classes, several labels where the model names one, and clips that changed under the run's own name,
    since it may have heard them."""
    classes = saved.labels.classes
    if set(card.classes) != set(classes):
        raise CheckpointError(
            f"{saved.folder} names {len(classes)} classes, {list(classes)[:4]}..., and {path} has {len(card.classes)}, "
            f"{list(card.classes)[:4]}...; evaluate on data with the same ones"
        )
    if card.digest != saved.labels.digest and not is_given:
        raise CheckpointError(
            f"data.path={path} has changed since {saved.folder} was trained on it (digest {card.digest}, not "
            f"{saved.labels.digest}); name data that it has not heard with --data"
        )
    if card.multi_label and not saved.labels.multi_label:
        raise CheckpointError(
            f"{saved.folder} names one class for each clip, and clips of {path} have several; evaluate on data with one"
        )
    has_its_name = data_name(path) == data_name(saved.config.data.path)
    if card.digest != saved.labels.digest and has_its_name and not _is_there(saved):
        raise DataError(
            f"--data={path}: has the name of the data set that trained {saved.folder}, which is not there any more, "
            "and may hold clips of it; pack clips that it never heard under another name, or train anew"
        )


@torch.no_grad()
def classify(
    model: AudioTransformer,
    config: RunConfig,
    clips: Clips,
    indices: NDArray[np.int64],
    *,
    multi_label: bool,
    most_windows: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> tuple[Float[Tensor, "clip label"], Float[Tensor, "clip label"]]:
    """Gives probabilities and targets of clips, in the order of `indices`; a long clip's windows, so many at most, are
    averaged.

    Every rank classifies its share and gets all answers. Raises MeamtmError where one is no number.
    """
    device = model.mel.mean.device
    loader = Loader(
        clips,
        indices,
        config.clip_samples,
        config.train.clips_at_once,
        seed=0,
        train=False,
        most_windows=most_windows,
        rank=rank,
        world_size=world_size,
    )
    position = torch.full((len(clips),), -1)
    position[torch.from_numpy(indices)] = torch.arange(len(indices))
    totals = torch.zeros(len(indices), len(clips.classes) + 1)  # sums of probabilities, and how many windows
    was_training = model.training
    model.eval()
    for batch in loader.epoch(0):
        if len(batch.index) == 0:  # of the last few clips, other ranks have them
            continue
        with autocast(config, device):
            logits = model(to_float(batch.waveform, device)).float()
        answer = logits.sigmoid() if multi_label else logits.softmax(1)
        totals.index_add_(
            0, position[torch.from_numpy(batch.index)], torch.nn.functional.pad(answer.cpu(), (0, 1), value=1.0)
        )
    model.train(was_training)
    if world_size > 1:
        totals = totals.to(device)
        dist.all_reduce(totals)
        totals = totals.cpu()
    probability = totals[:, :-1] / totals[:, -1:]
    if num_lost := int((~probability.isfinite().all(1)).sum()):
        raise MeamtmError(
            f"{num_lost} of {len(indices)} clips get answers that are no numbers, so training has diverged; lower "
            f"optim.lr ({config.optim.lr:g}) or set optim.clip_grad"
        )
    return probability, torch.from_numpy(clips.targets[indices])
