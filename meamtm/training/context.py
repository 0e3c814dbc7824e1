"""Where a run happens. `train` knows these six members and nothing else of the world around it."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch

from meamtm.config import ScaleConfig
from meamtm.errors import ConfigError
from meamtm.tracking import Sink
from meamtm.training.checkpoint import newest, publish


class Stopped(KeyboardInterrupt):
    """Training was asked to stop, and has saved what it had; to a record this is KILLED, not FAILED."""


@runtime_checkable
class Context(Protocol):
    """A plain process, a Ray Train worker or a Tune trial."""

    rank: int
    world_size: int
    device: torch.device

    def resume_from(self) -> Path | None:
        """Names the newest complete checkpoint of this run."""
        ...

    def report(self, metrics: Mapping[str, float], checkpoint: Path | None = None) -> None:
        """Takes one epoch's metrics, and publishes a checkpoint folder; called by every rank, once per epoch."""
        ...

    def should_stop(self) -> bool:
        """Tells whether to save and leave now; the same answer on every rank."""
        ...


class LocalContext:
    """A run in this process: checkpoints in its run folder, metrics to its sinks."""

    rank = 0
    world_size = 1

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        sinks: Sequence[Sink] = (),
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.folder = folder
        self.device = device
        self.sinks = sinks
        self._should_stop = should_stop

    def resume_from(self) -> Path | None:
        """Names the newest complete checkpoint in the run folder."""
        return newest(self.folder)

    def report(self, metrics: Mapping[str, float], checkpoint: Path | None = None) -> None:
        """Moves the checkpoint into the run folder, then tells the sinks, so that they never run ahead of it."""
        if checkpoint is not None:
            publish(checkpoint, self.folder)
        for sink in self.sinks if metrics else ():
            sink.log(metrics, int(metrics["epoch"]))

    def should_stop(self) -> bool:
        """Asks whoever started the run."""
        return self._should_stop()


def choose_device(scale: ScaleConfig) -> torch.device:
    """Turns `scale.device` into a device that this machine has."""
    has_cuda = torch.cuda.is_available()
    if scale.device == "cuda" and not has_cuda:
        raise ConfigError("scale.device='cuda', but torch sees no CUDA device here; write scale.device=auto or cpu")
    return torch.device("cuda" if has_cuda and scale.device != "cpu" else "cpu")
