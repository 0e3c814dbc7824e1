"""One batch forward and back, and the state that it moves."""

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3  # type: ignore[reportPrivateImportUsage]
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from meamtm.config import RunConfig, override
from meamtm.model.cnn import ConvNet
from meamtm.model.encoder import Encoder
from meamtm.model.masked import MaskedPrediction
from meamtm.model.precision import autocast, is_bf16
from meamtm.model.transformer import AudioTransformer
from meamtm.training.loss import clip_losses, distillation_losses, logits_together
from meamtm.training.optim import make_optimizer, set_lr
from meamtm.training.prepare import TrainingBatch
from meamtm.training.sam import worst_nearby
from meamtm.training.teacher import Teacher

MOST_FOR_NORMS = 4
"""Clips of the largest part of a convolutional network's batch that has hardly two for each part."""


class Average(ModelEmaV3):
    """A moving average of a model's weights, with timm's warm-up of the decay.

    timm gathers both models' weights anew for each update, which takes longer than averaging them.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, decay=decay, use_warmup=True)
        pairs = list(zip(self.module.state_dict().values(), model.state_dict().values(), strict=True))
        self._averaged = [(ours, theirs) for ours, theirs in pairs if ours.is_floating_point()]
        self._counted = [(ours, theirs) for ours, theirs in pairs if not ours.is_floating_point()]

    def apply_update_(self, model: nn.Module, decay: float) -> None:  # noqa: ARG002
        """Moves towards the model that was given at first, whose weights are changed in place."""
        ours, theirs = (list(weights) for weights in zip(*self._averaged, strict=True))
        self._foreach_lerp_(ours, theirs, weight=1 - decay)
        for count, newer in self._counted:
            count.copy_(newer)


@dataclass(frozen=True)
class Best:
    """The weights of the epoch that validated best so far."""

    epoch: int
    value: float
    """Of accuracy, or of mean average precision where clips have several labels."""
    weights: dict[str, Tensor]


@dataclass
class Learner:
    """Weights in training, and all that moves with them; (epoch, batch) is the cursor of the next step."""

    config: RunConfig
    model: AudioTransformer
    parallel: nn.Module
    optimizer: Optimizer
    ema: Average | None
    rank: int
    world_size: int
    multi_label: bool
    steps_per_epoch: int
    teachers: Sequence[Teacher] = ()
    masked: MaskedPrediction | None = None
    """What guesses hidden patches, as long as the encoder is pre-trained."""
    epoch: int = 0
    batch: int = 0
    losses: list[Tensor] = field(default_factory=list)
    """Sum of this rank's clip losses, one entry per step of the epoch."""
    best: Best | None = None
    """With `train.keep=best`, once an epoch is validated."""

    @property
    def evaluated(self) -> AudioTransformer:
        """What is validated: the averaged weights where there are any."""
        return self.ema.module if self.ema is not None else self.model  # type: ignore[return-value]

    @property
    def moved(self) -> nn.Module:
        """What a step moves the weights of."""
        return self.model if self.masked is None else self.masked

    @property
    def phase(self) -> str:
        """What the epochs at hand are for, as their loss is called."""
        return "train" if self.masked is None else "pretrain"

    @property
    def kept(self) -> dict[str, Tensor]:
        """The weights that a checkpoint is for."""
        return self.best.weights if self.best is not None else self.evaluated.state_dict()


def make_learner(
    config: RunConfig,
    model: AudioTransformer,
    device: torch.device,
    steps_per_epoch: int,
    *,
    multi_label: bool,
    rank: int = 0,
    world_size: int = 1,
    teachers: Sequence[Teacher] = (),
    pretrain: bool = False,
) -> Learner:
    """Puts a model on its device, with optimizer, averaged copy and, for several ranks, gradient averaging.

    With `pretrain` its encoder learns to guess hidden patches, and nothing is averaged meanwhile.
    """
    model = model.to(device)
    masked = _masked(model, config).to(device) if pretrain else None
    moved = model if masked is None else masked
    parallel: nn.Module = moved
    if world_size > 1:
        parallel = DistributedDataParallel(
            moved,
            device_ids=[device] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,  # or gradients would be there twice
            find_unused_parameters=pretrain,  # the head, and what pools
            **_keep_buffers(),
        )
    decay = config.train.ema_decay
    ema = Average(model, decay) if decay > 0 and not pretrain else None
    return Learner(
        config,
        model,
        parallel,
        make_optimizer(moved, _of_all_ranks(config, device) if world_size > 1 else config),
        ema,
        rank,
        world_size,
        multi_label,
        steps_per_epoch,
        teachers,
        masked,
    )


def _masked(model: AudioTransformer, config: RunConfig) -> MaskedPrediction:
    assert isinstance(model.encoder, Encoder), "a config refuses to pre-train what has no patches"
    return MaskedPrediction(model.encoder, config.pretrain.hidden).train()


def _of_all_ranks(config: RunConfig, device: torch.device) -> RunConfig:
    """Has every rank's optimizer multiply as the least able rank does: Muon's steps in bf16 and in float32 differ by
    0.7 %, and since ranks share nothing but gradients their weights would part."""
    able = torch.tensor([float(is_bf16(config, device))], device=device)
    dist.all_reduce(able, dist.ReduceOp.MIN)
    return override(config, {"train.precision": "bf16" if able.item() else "float32"})


def _keep_buffers() -> dict[str, Any]:
    """Leaves buffers alone in each forward: ranks compute the same ones. torch renamed the option in 2.15."""
    names = inspect.signature(DistributedDataParallel).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers": False}


def train_step(learner: Learner, batch: TrainingBatch) -> None:
    """Moves the weights by one batch."""
    parts = [_taught(learner, part) for part in _parts(learner, batch)]
    loss = _gradients(learner, parts)
    if learner.config.optim.sam_rho > 0:
        with worst_nearby(learner.moved, learner.config.optim.sam_rho):
            _gradients(learner, parts)
    _update(learner)
    learner.losses.append(loss)


def _gradients(learner: Learner, parts: Sequence[TrainingBatch]) -> Tensor:
    """Computes the gradients of one batch, and returns the sum of this rank's losses."""
    *earlier, last = parts
    _seed(last.seed, last.waveform.device)
    loss = torch.zeros((), device=last.waveform.device)
    parallel = learner.parallel
    for part in earlier:  # their gradients add up; ranks meet at the last part's
        with parallel.no_sync() if isinstance(parallel, DistributedDataParallel) else nullcontext():
            loss += _forward_and_back(learner, part)
    return loss + _forward_and_back(learner, last)


def _parts(learner: Learner, batch: TrainingBatch) -> list[TrainingBatch]:
    """Cuts a batch into `train.accumulation_steps` parts that differ in size by one clip at most, or into fewer, so
    that a convolutional network's have two clips to normalise over: an epoch's batches are smaller than asked for."""
    least_clips = batch.num_global // learner.world_size  # of a rank; all must take as many parts
    most_parts = max(1, least_clips // 2) if isinstance(learner.model.encoder, ConvNet) else least_clips
    count = min(learner.config.train.accumulation_steps, most_parts)
    masks = [None] * count if batch.mask is None else batch.mask.tensor_split(count)
    pieces = zip(batch.waveform.tensor_split(count), batch.target.tensor_split(count), masks, strict=True)
    return [replace(batch, waveform=waveform, target=target, mask=mask) for waveform, target, mask in pieces]


def _taught(learner: Learner, part: TrainingBatch) -> TrainingBatch:
    """Asks the teachers, if there are any, about the clips as they are mixed, with nothing masked."""
    if not learner.teachers or learner.masked is not None:
        return part
    temperature = learner.config.distill.temperature
    with torch.no_grad():
        with autocast(learner.config, part.waveform.device):
            answers = [teacher.model(part.waveform).float() for teacher in learner.teachers]
        together = logits_together(answers, multi_label=learner.multi_label, temperature=temperature)
    return replace(part, teacher_logits=together)


def _forward_and_back(learner: Learner, part: TrainingBatch) -> Tensor:
    """Adds to the gradients what these clips of a batch give, and returns the sum of their losses."""
    losses = _errors(learner, part) if learner.masked is not None else _losses(learner, part)
    loss = losses.sum() * learner.world_size / part.num_global  # ranks average gradients, clips count alike
    loss.backward()
    return losses.detach().sum()


def _errors(learner: Learner, part: TrainingBatch) -> Tensor:
    """Gives by how much the guess of each clip's hidden patches is wrong."""
    with torch.no_grad():
        image = learner.model.image(part.waveform)
    with autocast(learner.config, image.device):
        return learner.parallel(image)


def _losses(learner: Learner, part: TrainingBatch) -> Tensor:
    """Gives each clip's loss, and within it the distance from what teachers say."""
    config = learner.config
    with autocast(config, part.waveform.device):
        logits = learner.parallel(part.waveform, part.mask)
    logits, multi_label = logits.float(), learner.multi_label
    answers, echoes = logits.unbind(1) if logits.ndim == 3 else (logits, logits)  # heads for labels and for teachers
    smoothing, temperature = config.loss.label_smoothing, config.distill.temperature
    losses = clip_losses(answers, part.target, multi_label=multi_label, smoothing=smoothing)
    if (teacher := part.teacher_logits) is not None:
        distances = distillation_losses(echoes, teacher, multi_label=multi_label, temperature=temperature)
        losses = losses.lerp(distances, config.distill.weight)
    return losses


def _seed(seed: int, device: torch.device) -> None:
    """Seeds the generator from which stochastic depth, dropout and patchout draw.

    torch.manual_seed would seed those of all devices, which takes 0.4 ms where there are none.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _update(learner: Learner) -> None:
    optim = learner.config.optim
    pretrain, train = learner.config.pretrain, learner.config.train
    epoch, epochs = learner.epoch - pretrain.epochs, train.epochs
    if learner.masked is not None:
        epoch, epochs = learner.epoch, pretrain.epochs
    step = epoch * learner.steps_per_epoch + learner.batch
    num_steps = epochs * learner.steps_per_epoch
    if optim.clip_grad > 0:
        weights = [weight for group in learner.optimizer.param_groups for weight in group["params"]]
        torch.nn.utils.clip_grad_norm_(weights, optim.clip_grad, foreach=True)  # 3x faster on a CPU
    set_lr(learner.optimizer, optim, step, num_steps, learner.steps_per_epoch)
    learner.optimizer.step()
    learner.optimizer.zero_grad(set_to_none=True)
    if learner.ema is not None:
        learner.ema.update(learner.model, step=step)
    learner.batch += 1
