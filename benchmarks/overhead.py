"""What the training loop costs beside forward, backward and optimizer: epochs of `train` against a bare loop.

The bare loop takes the very same model over waveforms, targets and masks that lie ready in memory. Everything else (the
loader, augmentation, mixing, averaging, gradient clipping, metrics, JSON lines, MLflow and a checkpoint per minute) is
overhead. Epochs alternate, so that both see the same machine. A process gives the median ratio of its epochs, whose
neighbours differ by some 5 % on a virtual machine: of 11 epochs that median is good to 1.5 %, of 31 to 1. The figure is
the median of several processes.

    python benchmarks/overhead.py [--config configs/esc10.yaml] [--epochs 32] [--data data/esc10] [--processes 5]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as in meamtm.cli.main; torch reads it when it is loaded
import torch

from meamtm.config import RunConfig, load
from meamtm.data.cache import open_clips
from meamtm.data.loader import Loader
from meamtm.data.split import split_clips
from meamtm.model.precision import autocast
from meamtm.model.transformer import AudioTransformer
from meamtm.training.augment import spectrogram_mask
from meamtm.training.context import LocalContext
from meamtm.training.loss import clip_losses
from meamtm.training.optim import make_optimizer
from meamtm.training.prepare import to_float
from meamtm.training.run import absolute, open_record, run_folder
from meamtm.training.train import train


class BareLoop:
    """Forward, backward and optimizer over one epoch of tensors that lie ready."""

    def __init__(self, config: RunConfig) -> None:
        clips = open_clips(config.data, config.mel.sample_rate_hz)
        indices = split_clips(clips, config.data).train
        loader = Loader(clips, indices, config.clip_samples, config.train.batch_size, seed=0, train=True)
        generator, cpu = torch.Generator().manual_seed(0), torch.device("cpu")
        self.config = config
        self.batches = []
        for batch in loader.epoch(0):
            waveform = to_float(batch.waveform, cpu).clone()
            size = (len(waveform), config.mel.num_bands, config.num_frames)
            mask = spectrogram_mask(size, config.augment, generator)
            self.batches.append((waveform, torch.from_numpy(batch.target).clone(), mask))
        self.model = AudioTransformer(config, len(clips.classes))
        self.optimizer = make_optimizer(self.model, config.optim)

    def epoch_s(self) -> float:
        """Times one epoch, s."""
        began = time.perf_counter()
        for waveform, target, mask in self.batches:
            with autocast(self.config, waveform.device):
                logits = self.model(waveform, mask)
            losses = clip_losses(logits.float(), target, multi_label=False, smoothing=0.1)
            losses.mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - began


class Alternate:
    """A sink that, after each epoch of the real loop, times one of the bare loop."""

    def __init__(self, bare: BareLoop) -> None:
        self.bare, self.ours, self.bares = bare, [], []
        self.began = time.perf_counter()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Takes the time since the last epoch's end: checkpoints count as ours, and so do the other sinks, which are
        told after this one and so work during our next epoch."""
        del metrics, step
        self.ours.append(time.perf_counter() - self.began)
        self.bares.append(self.bare.epoch_s())
        self.began = time.perf_counter()


def measure(config: RunConfig) -> dict[str, float]:
    """Trains for real, alternating with the bare loop; the first epoch of each warms up."""
    bare = BareLoop(config)
    bare.epoch_s()
    alternate = Alternate(bare)
    with open_record(config) as sinks:
        train(config, LocalContext(run_folder(config), torch.device("cpu"), (alternate, sinks)))
    ours, bares = (statistics.median(times[1:]) for times in (alternate.ours, alternate.bares))
    ratios = [a / b for a, b in zip(alternate.ours[1:], alternate.bares[1:], strict=True)]
    return {"ours_s": ours, "bare_s": bares, "overhead_percent": 100 * (statistics.median(ratios) - 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/esc10.yaml")
    parser.add_argument("--data", default="data/esc10")
    parser.add_argument("--epochs", type=int, default=32)
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        with tempfile.TemporaryDirectory() as scratch:
            changes = {"data.path": options.data, "runs_dir": scratch, "train.epochs": options.epochs}
            changes["tracking.uri"] = f"sqlite:///{scratch}/mlflow.db"
            print(json.dumps(measure(absolute(load(options.config, changes)))))
        return
    runs = []
    for number in range(1, options.processes + 1):
        command = [sys.executable, *sys.argv, "--measure"]
        said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        ours_s, bare_s, percent = (run := json.loads(said.splitlines()[-1])).values()
        print(f"process {number}: an epoch: ours {ours_s:.2f} s, bare {bare_s:.2f} s, {percent:.1f} % more", flush=True)
        runs.append(run)
    percent = statistics.median(run["overhead_percent"] for run in runs)
    print(f"median of {options.processes}: {percent:.1f} % more")
    Path(__file__).with_suffix(".json").write_text(json.dumps({"overhead_percent": percent, "runs": runs}, indent=1))


if __name__ == "__main__":
    main()
