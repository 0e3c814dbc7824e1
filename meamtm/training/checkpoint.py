"""A run's state <-> one self-describing folder: complete or absent, and free of code.

`config.yaml`, `labels.json`, `model.safetensors` (the averaged weights, what one evaluates), `train_state.pt` (the
weights in training, the optimizer and the cursor) and, written last, `metrics.json` with a hash of every other file
and, where there were any, who taught it. No random state is kept: each step draws from generators made of (seed, epoch,
batch, rank)."""

import hashlib
import json
import logging
import pickle
import re
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from meamtm.config import RunConfig, flatten, load, write_yaml
from meamtm.errors import CheckpointError, ConfigError
from meamtm.files import sync
from meamtm.model.transformer import AudioTransformer

logger = logging.getLogger(__name__)
FORMAT = 1
STATE = "train_state.pt"
"""What only training needs: three quarters of a checkpoint, which a model in use can do without."""
RECORD = {"format", "epoch", "batch", "metrics", "files"}
NAME = re.compile(r"epoch-(\d{5,})(?:-batch-(\d+))?")
SETTLED_NS = 2_000_000_000
SCRATCH, SCRATCH_S = "meamtm-checkpoint-", 86_400.0
NUM_KEPT = 2
"""Newest checkpoints of a run that stay on disk: one, and one to fall back on."""


@dataclass(frozen=True)
class Labels:
    """What the logits of a model mean, and which data taught it."""

    classes: tuple[str, ...]
    multi_label: bool
    digest: str


@dataclass(frozen=True)
class Saved:
    """A model read back from its folder."""

    folder: Path
    config: RunConfig
    labels: Labels
    model: AudioTransformer
    metrics: dict[str, float]


def save(
    config: RunConfig,
    labels: Labels,
    weights: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
    metrics: Mapping[str, float],
    *,
    cursor: tuple[int, int],
    teachers: Sequence[Mapping[str, str]] = (),
) -> Path:
    """Writes a checkpoint into a new scratch folder, flushed to disk; a context publishes it.

    `cursor` counts finished epochs and, of the epoch under way, finished batches; `teachers` tells who taught, by
    checkpoint and digest.
    """
    _sweep_scratch()
    folder = Path(tempfile.mkdtemp(prefix=SCRATCH)) / checkpoint_name(cursor)
    try:
        folder.mkdir()
        write_yaml(folder / "config.yaml", flatten(config))
        (folder / "labels.json").write_text(json.dumps(labels.__dict__, indent=1))
        save_file({key: value.contiguous() for key, value in weights.items()}, folder / "model.safetensors")
        torch.save(dict(state), folder / STATE)
        files = {path.name: _digest(path) for path in sorted(folder.iterdir())}
        record = {"format": FORMAT, "epoch": cursor[0], "batch": cursor[1], "metrics": dict(metrics), "files": files}
        if teachers:
            record["teachers"] = [dict(each) for each in teachers]
        (folder / "metrics.json").write_text(json.dumps(record, indent=1))
        for path in folder.iterdir():
            sync(path)
    except (OSError, SafetensorError, RuntimeError) as error:  # a full disk is each of them, by who finds it full
        shutil.rmtree(folder.parent, ignore_errors=True)
        raise CheckpointError(
            f"{folder}: cannot be written ({' '.join(str(error).split())[:200]}); make room there, or set TMPDIR to "
            f"another folder; the same command continues"
        ) from error
    return folder


def publish(scratch: Path, run_folder: Path) -> Path:
    """Moves a scratch checkpoint into the run folder, whole, and drops all but the newest few.

    Newer ones can only be damaged, since training went on from before them, so they count for nothing and go too."""
    run_folder.mkdir(parents=True, exist_ok=True)
    part = run_folder / f".{scratch.name}.part"
    final = run_folder / scratch.name
    shutil.rmtree(part, ignore_errors=True)
    try:
        shutil.move(scratch, part)  # across file systems this copies, which is why it goes to a hidden name first
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
        sync(run_folder)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise CheckpointError(
            f"{final}: cannot be written ({error.strerror or error}); make room there; the same command continues"
        ) from error
    finally:
        shutil.rmtree(scratch.parent)
    for left in run_folder.glob(".epoch-*.part"):  # by a process that was killed
        shutil.rmtree(left)
    there = _checkpoints(run_folder)
    place = there.index(final)
    for gone in [*there[:place], *there[place + NUM_KEPT :]]:
        shutil.rmtree(gone)
    return final


def newest(run_folder: Path, *, to_train: bool = True) -> Path | None:
    """Names the newest complete checkpoint of a run; a damaged one is skipped with a warning."""
    for folder in _checkpoints(run_folder):
        try:
            read_record(folder, to_train=to_train)
        except CheckpointError as error:
            logger.warning("%s; the one before is used", error)
            continue
        return folder
    return None


def checkpoint_in(folder: Path) -> Path | None:
    """Names the newest complete checkpoint of a run, or the folder itself where that is a checkpoint."""
    return folder if (folder / "metrics.json").exists() else newest(folder, to_train=False)


def is_trained(checkpoint: Path) -> bool:
    """Whether a checkpoint is of a run's last epoch."""
    return read_record(checkpoint, to_train=False)["epoch"] >= load(checkpoint / "config.yaml").num_epochs


def read_record(folder: Path, *, to_train: bool = True) -> dict[str, Any]:
    """Reads metrics.json and checks every file against it; who is not going `to_train` needs no `train_state.pt`."""
    try:
        record = json.loads((folder / "metrics.json").read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        what = "not a checkpoint (no metrics.json)" if folder.exists() else "no such folder"
        raise CheckpointError(
            f"{folder}: {what}; name a run's folder, like runs/NAME, or one of its checkpoints, runs/NAME/epoch-00100"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: metrics.json cannot be read ({error}); use another checkpoint of the run"
        ) from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        found = record.get("format") if isinstance(record, dict) else record
        raise CheckpointError(f"{folder}: format {found!r} is not {FORMAT}; use the version of meamtm that wrote it")
    if lacking := ", ".join(sorted(RECORD - record.keys())):
        raise CheckpointError(f"{folder}: metrics.json lacks {lacking}; use another checkpoint of the run")
    for name, digest in record["files"].items():
        path = folder / name
        if name == STATE and not to_train and not path.exists():
            continue
        if not path.is_file() or _digest(path) != digest:
            raise CheckpointError(f"{folder}: {name} is missing or damaged; use another checkpoint of the run")
    return record


def load_model(folder: Path | str) -> Saved:
    """Builds the model that a checkpoint describes; needs nothing else, not even its training state, and runs no code
    from it.

    A run folder stands for its newest checkpoint.
    """
    folder = checkpoint_in(Path(folder)) or Path(folder)
    record = read_record(folder, to_train=False)
    try:
        config = load(folder / "config.yaml")
        labels = read_labels(folder)
        model = AudioTransformer(config, len(labels.classes))
        model.load_state_dict(load_weights(folder))
    except (ConfigError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]  # torch lists every weight on a line of its own
        raise CheckpointError(f"{folder}: its weights and its config do not fit ({reason})") from error
    return Saved(folder, config, labels, model.eval(), record["metrics"])


def read_labels(folder: Path) -> Labels:
    """Reads what a checkpoint's logits mean."""
    try:
        fields = json.loads((folder / "labels.json").read_text())
        labels = Labels(tuple(fields["classes"]), bool(fields["multi_label"]), str(fields["digest"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: labels.json cannot be used ({error!r})") from error
    if len(labels.classes) < 2:
        raise CheckpointError(f"{folder}: labels.json names {len(labels.classes)} class; a classifier has two or more")
    return labels


def taught_by(run_folder: Path) -> str | None:
    """Gives the digest of the data set that taught a run's newest checkpoint; None where it has none."""
    found = newest(run_folder, to_train=False)
    return read_labels(found).digest if found is not None else None


def check_origin(folder: Path, labels: Labels, data_path: str) -> None:
    """Raises CheckpointError if another data set than this one has taught a run."""
    found = read_labels(folder)
    if found != labels:
        raise CheckpointError(
            f"{folder} was trained on other data than {data_path!r} (digest {found.digest}, not {labels.digest}); "
            f"set another name, or remove that run folder"
        )


def load_weights(folder: Path, device: torch.device | None = None) -> dict[str, torch.Tensor]:
    """Reads the weights that a checkpoint is for."""
    return load_file(folder / "model.safetensors", device=str(device or "cpu"))


def load_state(folder: Path) -> dict[str, Any]:
    """Reads the training state, as data only."""
    try:
        return torch.load(folder / STATE, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(
            f"{folder}: {STATE} is damaged or holds more than data; use another checkpoint of the run"
        ) from error


def checkpoint_name(cursor: tuple[int, int]) -> str:
    """Names a checkpoint by its cursor."""
    epoch, batch = cursor
    return f"epoch-{epoch:05d}" + (f"-batch-{batch:06d}" if batch else "")


def _sweep_scratch() -> None:
    """Removes what killed processes left in the temporary folder; living ones need theirs for minutes."""
    for left in Path(tempfile.gettempdir()).glob(f"{SCRATCH}*"):
        with suppress(FileNotFoundError):  # another process sweeps too
            if time.time() - left.stat().st_mtime > SCRATCH_S:
                shutil.rmtree(left, ignore_errors=True)


def _checkpoints(run_folder: Path) -> list[Path]:
    """A run's checkpoints, damaged ones too, the newest first; a folder of another name is the user's."""
    named = [(NAME.fullmatch(path.name), path) for path in run_folder.glob("epoch-*") if path.is_dir()]
    cursors = {path: (int(name[1]), int(name[2] or 0)) for name, path in named if name is not None}
    return sorted(cursors, key=lambda path: cursors[path], reverse=True)


def _digest(path: Path) -> str:
    """Reads a file once, however often one asks, unless it is so new that a change might not show in its time."""
    found = path.stat()
    read = _digest_of if time.time_ns() - found.st_mtime_ns > SETTLED_NS else _digest_of.__wrapped__
    return read(path, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=1024)  # a pattern of teachers may match hundreds of files, and is asked four times a run
def _digest_of(path: Path, _size_bytes: int, _changed_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
