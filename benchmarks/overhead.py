"""What the training loop costs beside forward, backward and optimizer: `train` against a bare loop.

The bare loop takes the very same model over waveforms, targets and masks that lie ready in memory. Everything else (the
loader, augmentation, mixing, averaging, gradient clipping, metrics, JSON lines, MLflow and a checkpoint per minute) is
overhead. Steps alternate, one of ours and one bare, so that both see the same machine: what a virtual machine's
neighbours take comes and goes within seconds. MLflow's deliveries, some 10 ms every 15 s, fall into either; all else
that is not a bare step counts as ours. Half of each minute is the bare loop's, so checkpoints come every second one.
A process gives the ratio of its sums, without the first epoch; the figure is the median of several processes.

    python benchmarks/overhead.py [--config configs/esc10.yaml] [--epochs 16] [--data data/esc10] [--processes 5]
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

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as in meamtm.screen; torch reads it when it is loaded
import torch

from meamtm.config import RunConfig, load, run_folder
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
from meamtm.training.run import absolute, open_record
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
        self.optimizer = make_optimizer(self.model, config)
        self.num_steps = 0

    def step(self) -> None:
        """Takes the next batch, round and round."""
        waveform, target, mask = self.batches[self.num_steps % len(self.batches)]
        with autocast(self.config, waveform.device):
            logits = self.model(waveform, mask)
        losses = clip_losses(logits.float(), target, multi_label=False, smoothing=0.1)
        losses.mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.num_steps += 1


class Alternate:
    """Times a bare step after each of the real loop's, which asks there whether it should stop; as a sink it hears when
    an epoch ends."""

    def __init__(self, bare: BareLoop) -> None:
        self.bare, self.ours, self.bares = bare, [], []
        self.began, self.bare_s = time.perf_counter(), 0.0

    def should_stop(self) -> bool:
        began = time.perf_counter()
        self.bare.step()
        self.bare_s += time.perf_counter() - began
        return False

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Takes the time since the last epoch's end: checkpoints count as ours, and so do the other sinks, which are
        told after this one and so work during our next epoch."""
        del metrics, step
        now = time.perf_counter()
        self.ours.append(now - self.began - self.bare_s)
        self.bares.append(self.bare_s)
        self.began, self.bare_s = now, 0.0


def measure(config: RunConfig) -> dict[str, float]:
    """Trains for real, alternating with the bare loop; the first epoch warms both up."""
    alternate = Alternate(BareLoop(config))
    with open_record(config) as sinks:
        context = LocalContext(run_folder(config), torch.device("cpu"), (alternate, sinks), alternate.should_stop)
        train(config, context)
    ours, bares = alternate.ours[1:], alternate.bares[1:]
    ours_s, bare_s = statistics.median(ours), statistics.median(bares)
    return {"ours_s": ours_s, "bare_s": bare_s, "overhead_percent": 100 * (sum(ours) / sum(bares) - 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/esc10.yaml")
    parser.add_argument("--data", default="data/esc10")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        with tempfile.TemporaryDirectory() as scratch:
            changes = {"data.path": options.data, "runs_dir": scratch, "train.epochs": options.epochs}
            changes["tracking.uri"] = f"sqlite:///{scratch}/mlflow.db"
            changes["train.checkpoint_s"] = 2 * RunConfig().train.checkpoint_s
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
