"""train(config, context): the one training loop. Data and a config come in, a trained checkpoint goes out."""

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from meamtm.config import DataConfig, MelConfig, OptimConfig, RunConfig, signature
from meamtm.data.cache import open_clips
from meamtm.data.clips import Clips
from meamtm.data.loader import Loader
from meamtm.data.split import Split, split_clips
from meamtm.errors import MeamtmError
from meamtm.model.pretrained import borrow
from meamtm.model.transformer import AudioTransformer
from meamtm.training.checkpoint import Labels, check_origin, load_state, load_weights, read_record, save
from meamtm.training.context import Context, Stopped
from meamtm.training.deterministic import deterministic
from meamtm.training.evaluate import classify
from meamtm.training.heap import set_up_heap, settled_objects
from meamtm.training.metrics import scores
from meamtm.training.prepare import to_float, training_batches, training_loader
from meamtm.training.recalibrate import recalibrate
from meamtm.training.step import Best, Learner, make_learner, train_step
from meamtm.training.teacher import Teacher, find_teachers, load_teacher, tell_teachers

logger = logging.getLogger(__name__)
MAX_WINDOWS = 8
"""Windows into which a validation cuts a long clip, at most; a test hears all of it."""
NUM_MEASURED = 512
"""Training clips whose spectrograms give mean and deviation; more change neither visibly."""
_MEASURED: dict[tuple[DataConfig, MelConfig, str], tuple[float, float]] = {}
"""What this process has measured: a study's trials mostly hear the same."""


def train(config: RunConfig, context: Context) -> dict[str, float]:
    """Trains to the last epoch, from the run's newest checkpoint if there is one, and returns the last metrics.

    A finished run returns at once. Raises Stopped, after saving, when the context asks to stop.
    """
    with deterministic(config.train.deterministic), settled_objects():
        return _train(config, context)


def _train(config: RunConfig, context: Context) -> dict[str, float]:
    set_up_heap(sparing=config.train.grad_checkpointing)
    clips = open_clips(config.data, config.mel.sample_rate_hz)
    split = split_clips(clips, config.data)
    loader = training_loader(config, clips, split.train, rank=context.rank, world_size=context.world_size)
    labels = Labels(clips.classes, clips.multi_label, clips.digest)
    learner = _start(config, context, clips, split, loader.num_batches)
    metrics = _resume(learner, context, labels)
    last_save_s = time.monotonic()
    while learner.epoch < config.num_epochs:
        began_s = time.monotonic()
        cursor = {"epoch": learner.epoch, "start": learner.batch, "rank": context.rank}
        for batch in training_batches(loader, config, context.device, **cursor):
            train_step(learner, batch)
            if context.should_stop():
                learner.losses = _summed(learner)
                context.report({}, _save(learner, labels, metrics) if context.rank == 0 else None)
                raise Stopped(
                    f"stopped after {learner.epoch} epochs and {learner.batch} batches; the same command continues"
                )
        metrics = _finish_epoch(learner, loader.num_heard)
        is_last = learner.epoch == config.num_epochs
        if learner.masked is None:
            metrics |= _assess(learner, clips, split, context, is_last=is_last)
        elif learner.epoch == config.pretrain.epochs:
            done = {"multi_label": clips.multi_label, "epoch": learner.epoch}
            learner = _learner(config, context, learner.model, learner.teachers, loader.num_batches, **done)
        metrics["time/epoch_s"] = time.monotonic() - began_s
        is_due = _agreed(is_last or time.monotonic() - last_save_s >= config.train.checkpoint_s, learner)
        context.report(metrics, _save(learner, labels, metrics) if is_due and context.rank == 0 else None)
        if is_due:
            last_save_s = time.monotonic()
    return metrics


def _assess(learner: Learner, clips: Clips, split: Split, context: Context, *, is_last: bool) -> dict[str, float]:
    """Validates what has been learnt so far, and with `train.keep=best` keeps it if it is the best."""
    config, keeps_best = learner.config, learner.config.train.keep == "best"
    if config.train.recalibrate and (is_last or keeps_best):
        ranks = {"rank": context.rank, "world_size": context.world_size}
        recalibrate(learner.evaluated, config, clips, split.train, **ranks)
    metrics = _validate(learner, clips, split.valid, context)
    return metrics | (_keep_best(learner, metrics) if keeps_best else {})


def _warn_of_scratch(optim: OptimConfig) -> None:
    """Says so where published weights are about to be trained with the defaults, which are for fresh ones."""
    default = OptimConfig()
    if (optim.name, optim.lr) == (default.name, default.lr):
        logger.warning(
            "optim.name=%s with optim.lr=%g is for training from scratch and leaves little of published weights; "
            "fine-tuning wants optim.name=adamw and a rate of 1e-5 to 1e-4 (configs/ast.yaml)",
            optim.name,
            optim.lr,
        )


def _start(config: RunConfig, context: Context, clips: Clips, split: Split, steps_per_epoch: int) -> Learner:
    torch.manual_seed(config.train.seed)
    model = AudioTransformer(config, len(clips.classes))
    found = context.resume_from()
    epoch = 0 if found is None else read_record(found)["epoch"]
    if found is None:
        heard = (config.data, config.mel, clips.digest)
        if heard not in _MEASURED:
            _MEASURED[heard] = _measure(model, clips, split.train, config.clip_samples)
        model.mel.fit(*_MEASURED[heard])
        if config.encoder.pretrained != "none":
            borrowed = borrow(model.encoder, config.encoder)
            if context.rank == 0:
                logger.info("%s", borrowed)
                _warn_of_scratch(config.optim)
    teachers = _teachers(config, context)  # once: others that could teach may end meanwhile
    return _learner(config, context, model, teachers, steps_per_epoch, multi_label=clips.multi_label, epoch=epoch)


def _teachers(config: RunConfig, context: Context) -> list[Teacher]:
    """Reads those that teach a run, on every rank those that the first one finds."""
    told = [find_teachers(config)]
    if context.world_size > 1:
        dist.broadcast_object_list(told, src=0, device=context.device)
    teachers = [load_teacher(each, context.device) for each in told[0]]
    if teachers and context.rank == 0:
        tell_teachers(config, teachers)
    return teachers


def _learner(
    config: RunConfig,
    context: Context,
    model: AudioTransformer,
    teachers: Sequence[Teacher],
    steps_per_epoch: int,
    *,
    multi_label: bool,
    epoch: int,
) -> Learner:
    """Makes what trains a model from an epoch on: for `pretrain.epochs` it guesses hidden patches, then, with a new
    optimizer, it learns labels."""
    learner = make_learner(
        config,
        model.train(),
        context.device,
        steps_per_epoch,
        multi_label=multi_label,
        rank=context.rank,
        world_size=context.world_size,
        teachers=teachers,
        pretrain=epoch < config.pretrain.epochs,
    )
    learner.epoch = epoch
    return learner


@torch.no_grad()
def _measure(
    model: AudioTransformer, clips: Clips, indices: NDArray[np.int64], clip_samples: int
) -> tuple[float, float]:
    """Gives mean and deviation of log-mel cells over training clips, the same on every rank; of a long clip its middle
    counts, as training hears it no longer than others."""
    chosen = indices[np.linspace(0, len(indices) - 1, min(len(indices), NUM_MEASURED)).astype(np.int64)]
    loader = Loader(clips, chosen, clip_samples, 32, seed=0, train=False, most_windows=1)
    total, total_square, count = 0.0, 0.0, 0
    for batch in loader.epoch(0):
        log_mel = model.mel.log_mel(to_float(batch.waveform, model.mel.mean.device)).double()
        total += float(log_mel.sum())
        total_square += float(log_mel.square().sum())
        count += log_mel.numel()
    mean = total / count
    return mean, max(total_square / count - mean**2, 0.0) ** 0.5


def _resume(learner: Learner, context: Context, labels: Labels) -> dict[str, float]:
    """Puts the newest checkpoint's state into the learner and returns its metrics."""
    folder = context.resume_from()
    if folder is None:
        return {}
    check_origin(folder, labels, learner.config.data.path)
    record, state = read_record(folder), load_state(folder)
    learner.model.load_state_dict(state["model"])
    if learner.masked is not None:
        learner.masked.decoder.load_state_dict(state["decoder"])
    learner.optimizer.load_state_dict(state["optimizer"])
    if learner.ema is not None:
        learner.ema.module.load_state_dict(state["ema"])
    learner.epoch, learner.batch = record["epoch"], record["batch"]
    losses = [loss.to(context.device) for loss in state["losses"]]
    learner.losses = [loss * (context.rank == 0) for loss in losses]  # of all ranks, so one has them
    if "best" in state:
        learner.best = Best(**state["best"], weights=load_weights(folder, context.device))
    logger.info("continuing %s after epoch %d", signature(learner.config), learner.epoch)
    return dict(record["metrics"])


def _save(learner: Learner, labels: Labels, metrics: Mapping[str, float]) -> Path:
    state = {
        "model": learner.model.state_dict(),
        "optimizer": learner.optimizer.state_dict(),
        "ema": learner.ema.module.state_dict() if learner.ema is not None else {},
        "losses": learner.losses,
    }
    if learner.masked is not None:
        state["decoder"] = learner.masked.decoder.state_dict()
    if learner.best is not None:
        state["best"] = {"epoch": learner.best.epoch, "value": learner.best.value}
    cursor = (learner.epoch, learner.batch)
    teachers = [{"checkpoint": one.checkpoint, "digest": one.digest} for one in learner.teachers]
    return save(learner.config, labels, learner.kept, state, metrics, cursor=cursor, teachers=teachers)


def _finish_epoch(learner: Learner, num_clips: int) -> dict[str, float]:
    """Closes the epoch: moves the cursor on and returns its mean loss over the clips of all ranks."""
    losses = torch.stack(_summed(learner))  # (step,)
    if not bool(losses.isfinite().all()):
        step = int((~losses.isfinite()).nonzero()[0])
        raise MeamtmError(
            f"{learner.phase}/loss is {float(losses[step])} at step {step} of epoch {learner.epoch + 1}; "
            f"lower optim.lr ({learner.config.optim.lr:g}) or set optim.clip_grad"
        )
    learner.epoch, learner.batch, learner.losses = learner.epoch + 1, 0, []
    return {
        "epoch": float(learner.epoch),
        f"{learner.phase}/loss": float(losses.sum()) / num_clips,
        "train/lr": learner.optimizer.param_groups[0]["lr"],
    }


def _summed(learner: Learner) -> list[Tensor]:
    """Gives the losses of the epoch's steps, summed over all ranks."""
    if learner.world_size == 1:
        return learner.losses
    losses = torch.stack(learner.losses)  # (step,)
    dist.all_reduce(losses)
    return list(losses)


def _validate(learner: Learner, clips: Clips, indices: NDArray[np.int64], context: Context) -> dict[str, float]:
    if len(indices) == 0:
        return {}
    probability, target = classify(
        learner.evaluated,
        learner.config,
        clips,
        indices,
        multi_label=clips.multi_label,
        most_windows=MAX_WINDOWS,
        rank=context.rank,
        world_size=context.world_size,
    )
    values = scores(probability, target, multi_label=clips.multi_label)
    return {f"valid/{name}": value for name, value in values.items()}


def _keep_best(learner: Learner, metrics: Mapping[str, float]) -> dict[str, float]:
    """Takes the epoch's weights if none before validated better; of equals the later has learnt more."""
    name = "map" if learner.multi_label else "accuracy"
    value = metrics[f"valid/{name}"]
    if learner.best is None or value >= learner.best.value:
        weights = {key: weight.detach().clone() for key, weight in learner.evaluated.state_dict().items()}
        learner.best = Best(learner.epoch, value, weights)
    return {"best/epoch": float(learner.best.epoch), f"best/{name}": learner.best.value}


def _agreed(answer: bool, learner: Learner) -> bool:
    """Gives every rank the first one's answer."""
    if learner.world_size == 1:
        return answer
    flag = torch.tensor([float(answer)], device=learner.model.mel.mean.device)
    dist.broadcast(flag, src=0)
    return bool(flag.item())
