"""A configuration -> what its training takes, in memory at its highest and on disk, and whether there is as much,
before anything is trained.

One step forward and back runs on fake tensors, which have a shape and a type but no memory, through the very code that
trains; every storage that comes and goes is counted."""

import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from meamtm.config import RunConfig, override
from meamtm.data.cache import open_clips
from meamtm.data.split import split_clips
from meamtm.errors import TooLargeError
from meamtm.model.cnn import ConvNet
from meamtm.model.cost import cost, weightless
from meamtm.model.encoder import Encoder
from meamtm.model.masked import MaskedPrediction
from meamtm.model.precision import is_bf16
from meamtm.training.optim import count_state
from meamtm.training.prepare import training_loader
from meamtm.training.recalibrate import FEWEST_CLIPS
from meamtm.training.step import MOST_FOR_NORMS
from meamtm.training.teacher import teacher_configs

CGROUPS = Path("/sys/fs/cgroup")
CPU = torch.device("cpu")
LIBRARIES_BYTES = 700_000_000
"""What a process with torch and MLflow holds before it trains."""


def peak_training_bytes(
    config: RunConfig, num_labels: int = 10, device: torch.device = CPU, teachers: Sequence[RunConfig] = ()
) -> int:
    """Estimates what one process's training allocates at its peak, beyond what Python and torch take by themselves.

    Counted are weights, their moving average, what the optimizer keeps, gradients, activations, waveforms and
    teachers, with the kernels of a CPU and in the precision that the device has. What the system shows of a process is
    more, by the fragments of its heap (docs/results.md).
    """
    kinds = [_large(each) for each in (config, *teachers)]  # frozen, so pydantic gives them a hash
    return _peak_bytes(kinds[0], num_labels, device, tuple(kinds[1:]))  # type: ignore[reportArgumentType]


def _large(config: RunConfig) -> RunConfig:
    """Leaves of a config what takes memory, so that runs of other folds, seeds, rates or mixing are counted once."""
    plain = RunConfig()
    kept = {section: getattr(config, section) for section in ("mel", "encoder", "pretrain", "scale")}
    kept["data"] = plain.data.model_copy(update={"clip_s": config.data.clip_s})
    kept["optim"] = plain.optim.model_copy(update=config.optim.model_dump(include={"name", "sam_rho"}))
    kept["train"] = config.train.model_copy(update=plain.train.model_dump(include={"seed", "epochs", "epoch_batches"}))
    return plain.model_copy(update=kept)


@lru_cache(maxsize=256)
def _peak_bytes(config: RunConfig, num_labels: int, device: torch.device, teachers: tuple[RunConfig, ...]) -> int:
    num_clips = -(-config.train.batch_size // max(config.scale.least_workers, 1))
    num_at_once = -(-num_clips // config.train.accumulation_steps)
    if config.encoder.cnn != "none":
        num_at_once = max(num_at_once, min(num_clips, MOST_FOR_NORMS))
    state_bytes = 4 * count_state(config, num_labels)
    most = _learning_bytes(config, num_labels, num_at_once, device, teachers)
    if config.train.recalibrate and num_at_once < FEWEST_CLIPS:
        most = max(most, _recalibrating_bytes(config, num_labels, device, teachers))
    if config.pretrain.epochs > 0:
        most = max(most, _guessing_bytes(config, num_labels, num_at_once, device, teachers))
    return most + state_bytes + _waveform_bytes(config, num_clips)


def _learning_bytes(
    config: RunConfig, num_labels: int, num_clips: int, device: torch.device, teachers: Sequence[RunConfig]
) -> int:
    """Estimates what a step that learns labels takes at its peak, weights and their copies among it."""
    encoder = _new_encoder(config, num_labels)
    teaching = [weightless(teacher, num_labels).eval() for teacher in teachers]
    with _counting([encoder, *teaching]) as count:
        with _autocast(config, device):
            for teacher, model in zip(teachers, teaching, strict=True):
                with torch.no_grad():
                    model(_image(teacher, config.clip_samples, num_clips))
            logits = encoder(_image(config, config.clip_samples, num_clips))
        logits.float().logsumexp(1).sum().backward()
    return count.peak_bytes + _num_copies(config) * _weight_bytes(encoder) + sum(map(_weight_bytes, teaching))


def _recalibrating_bytes(
    config: RunConfig, num_labels: int, device: torch.device, teachers: Sequence[RunConfig]
) -> int:
    """Estimates the same of a batch that goes forward alone, larger than a part that learns; 0 without batch norm.

    Its waveforms come on top of the last step's, and without gradients a convolution lays its image out anew."""
    encoder = weightless(config, num_labels).eval()
    if not any(isinstance(module, nn.BatchNorm2d) for module in encoder.modules()):
        return 0
    num_clips = -(-FEWEST_CLIPS // max(config.scale.least_workers, 1))
    with _counting([encoder]) as count, torch.no_grad(), _autocast(config, device):
        encoder(_image(config, config.clip_samples, num_clips))
    waiting = [weightless(teacher, num_labels) for teacher in teachers]
    activations_bytes = count.peak_bytes + count.largest_bytes + _waveform_bytes(config, num_clips)
    return activations_bytes + _num_copies(config) * _weight_bytes(encoder) + sum(map(_weight_bytes, waiting))


def _waveform_bytes(config: RunConfig, num_clips: int) -> int:
    return num_clips * config.clip_samples * (2 + 4)  # as read, and as played


def _num_copies(config: RunConfig) -> int:
    """Counts the weights that training holds beside their gradients."""
    return 1 + (config.train.ema_decay > 0) + (config.train.keep == "best") + (config.optim.sam_rho > 0)


def _guessing_bytes(
    config: RunConfig, num_labels: int, num_clips: int, device: torch.device, teachers: Sequence[RunConfig]
) -> int:
    """Estimates the same of a step that guesses hidden patches, while teachers wait."""
    encoder = _new_encoder(config, num_labels)
    assert isinstance(encoder, Encoder), "a config refuses to pre-train what has no patches"
    with torch.device("meta"):
        masked = MaskedPrediction(encoder, config.pretrain.hidden).train()
    with _counting([masked]) as count:
        with _autocast(config, device):
            errors = masked(_image(config, config.clip_samples, num_clips))
        errors.sum().backward()
    waiting = [weightless(teacher, num_labels) for teacher in teachers]
    kept_copies = 1 + (config.optim.sam_rho > 0)
    return count.peak_bytes + kept_copies * _weight_bytes(masked) + sum(map(_weight_bytes, waiting))


def checkpoint_bytes(config: RunConfig, num_labels: int = 10) -> int:
    """Estimates what one checkpoint takes on disk: weights kept and weights trained, what the optimizer keeps, the
    moving average."""
    copies = 2 + (config.train.ema_decay > 0)
    return 4 * (copies * cost(config, num_labels).num_params + count_state(config, num_labels))


def check_memory(config: RunConfig, device: torch.device, num_at_once: int = 1) -> None:
    """Raises TooLargeError where training cannot fit into a device's memory, or into an equal share of a machine's on
    which several processes train at once."""
    if device.type == "cuda":
        num_at_once = 1  # Ray gives each its share
        there = int(config.scale.gpus_per_worker * torch.cuda.get_device_properties(device).total_memory)
    else:
        there = memory_limit_bytes(CGROUPS)
        if num_at_once > 1:
            there = max(1, there // num_at_once - LIBRARIES_BYTES)
    if (needed := needed_bytes(config, device)) > there:
        shared, fewer = (f" for each of {num_at_once}", "train fewer at once, ") if num_at_once > 1 else ("", "")
        can_checkpoint = config.encoder.cnn == "none" and not config.train.grad_checkpointing
        last = ", raise train.accumulation_steps or scale.workers, or set train.grad_checkpointing=true"
        raise TooLargeError(
            f"train.batch_size={config.train.batch_size} takes {needed / 1e9:,.1f} GB at training's peak, and there "
            f"are {there / 1e9:,.1f} GB{shared}; {fewer}lower it"
            + (last if can_checkpoint else ", or raise train.accumulation_steps or scale.workers"),
            needed / there - 1,
        )


def needed_bytes(config: RunConfig, device: torch.device = CPU) -> int:
    """Estimates the peak of training on a run's own clips: a batch holds no more than an epoch hears."""
    clips = open_clips(config.data, config.mel.sample_rate_hz)
    loader = training_loader(config, clips, split_clips(clips, config.data).train)
    largest = override(config, {"train.batch_size": min(config.train.batch_size, loader.num_heard)})
    return peak_training_bytes(largest, len(clips.classes), device, teacher_configs(config))


def memory_limit_bytes(cgroups: Path, mine: Path = Path("/proc/self/cgroup")) -> int:
    """Gives the memory that a process may use: the machine's, or what a container or a batch system leaves of it."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for line in mine.read_text().splitlines() if mine.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, name = cgroups, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = cgroups / "memory", "memory.limit_in_bytes"
        else:
            continue
        place = root / path.lstrip("/")
        for folder in (place, *place.parents):  # a group's limit holds for those within it, too
            if folder.is_relative_to(root) and (folder / name).exists():
                text = (folder / name).read_text().strip()
                limits += [int(text)] if text.isdigit() else []  # or "max"
    return min(limits)


def _new_encoder(config: RunConfig, num_labels: int) -> Encoder | ConvNet:
    encoder = weightless(config, num_labels).train()
    encoder.set_grad_checkpointing(config.train.grad_checkpointing)
    return encoder


def _autocast(config: RunConfig, device: torch.device) -> torch.autocast:
    """Computes on this CPU in the precision of a device."""
    return torch.autocast("cpu", torch.bfloat16, enabled=is_bf16(config, device), cache_enabled=False)


@contextmanager
def _counting(models: Sequence[nn.Module]) -> "Iterator[_Count]":
    """Counts what is made of models that have no memory."""
    with FakeTensorMode(), torch.random.fork_rng(devices=[]):
        for model in models:
            _bring_to_cpu(model)
        with _Count(models) as count:
            yield count


class _Count(TorchDispatchMode):
    """Adds up the storages that operations make, for as long as something refers to them.

    Models' own weights are no operation's: a view of one, as a linear layer takes it, makes nothing.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self.peak_bytes = 0
        self.largest_bytes = 0
        """Of one storage."""
        self._live_bytes = 0
        weights = (tensor for model in models for tensor in (*model.parameters(), *model.buffers()))
        self._known = {tensor.untyped_storage()._cdata for tensor in weights}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        self.peak_bytes = max(self.peak_bytes, self._live_bytes)
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, num_bytes = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self._live_bytes += num_bytes
            self.largest_bytes = max(self.largest_bytes, num_bytes)
            weakref.finalize(storage, self._forget, key, num_bytes)

    def _forget(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self._live_bytes -= num_bytes


def _image(config: RunConfig, num_samples: int, num_clips: int) -> Tensor:
    return torch.empty(num_clips, 1, config.mel.num_bands, config.mel.num_frames(num_samples))


def _weight_bytes(model: nn.Module) -> int:
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())


def _bring_to_cpu(module: nn.Module) -> None:
    """Replaces weights and buffers by fake ones; inside a fake mode `to_empty` cannot."""
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                part._parameters[name] = nn.Parameter(torch.empty_strided(weight.shape, weight.stride()))
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty_strided(buffer.shape, buffer.stride(), dtype=buffer.dtype)
