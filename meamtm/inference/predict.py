"""Audio files and a checkpoint -> probabilities or embeddings, file by file."""

import csv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from meamtm.data.audio import read_audio
from meamtm.data.loader import cut_windows
from meamtm.data.sources import AUDIO_SUFFIXES, find_sounds
from meamtm.errors import DataError
from meamtm.model.precision import autocast
from meamtm.training.checkpoint import Labels, Saved
from meamtm.training.predictions import name_labels
from meamtm.training.prepare import to_float

WINDOWS_AT_ONCE = 32


@dataclass(frozen=True)
class Answer:
    """What one file gave: numbers, or the reason why not."""

    path: Path
    values: Float32[np.ndarray, " value"] | None
    problem: str = ""


def find_audio(paths: Sequence[Path]) -> list[Path]:
    """Lists the audio files among paths and inside folders, in a fixed order; DataError if there is none."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += find_sounds(path)
        elif path.exists():
            found.append(path)
        else:
            raise DataError(f"{path}: no such file or folder; name audio files or folders of them")
    if not found:
        raise DataError(
            f"{', '.join(map(str, paths))}: no {', '.join(sorted(AUDIO_SUFFIXES))} file in there; name another folder"
        )
    return found


def classify_files(saved: Saved, paths: Sequence[Path]) -> Iterator[Answer]:
    """Gives each file's probabilities (label,), the mean over windows of the length that the model was trained on."""
    for path in paths:
        yield _answer(saved, path, lambda waveform: _probabilities(saved, waveform))


def embed_files(saved: Saved, paths: Sequence[Path]) -> Iterator[Answer]:
    """Gives each file's embedding (width,), the mean over its windows."""
    for path in paths:
        yield _answer(saved, path, saved.model.features)


def check_any(answers: Sequence[Answer]) -> None:
    """Raises DataError if not a single file could be read."""
    if all(answer.values is None for answer in answers):
        first = answers[0]
        others = "" if len(answers) == 1 else f" (nor can the other {len(answers) - 1} files be used)"
        raise DataError(f"{first.path}: {first.problem}{others}; name files with sound in them")


def write_csv(out: Path, labels: Labels, answers: Sequence[Answer]) -> None:
    """Writes one line per file: its class, or, where a clip may have several, all that are above one half, separated by
    `;`; every class's probability; and what was wrong with it."""
    classes = labels.classes
    with out.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "class", *classes, "problem"])
        for answer in answers:
            if answer.values is None:
                writer.writerow([answer.path, "", *[""] * len(classes), answer.problem])
            else:
                named = name_labels(answer.values, classes, multi_label=labels.multi_label)
                writer.writerow([answer.path, named, *(f"{value:.6f}" for value in answer.values), ""])


def write_npz(out: Path, answers: Sequence[Answer]) -> int:
    """Writes paths (file,) and embeddings (file, width) of the readable files, and returns their number."""
    good = [(str(answer.path), answer.values) for answer in answers if answer.values is not None]
    with out.open("wb") as file:
        np.savez(file, path=[path for path, _ in good], embedding=np.stack([values for _, values in good]))
    return len(good)


def _answer(saved: Saved, path: Path, function: Callable[[Tensor], Tensor]) -> Answer:
    try:
        samples, _ = read_audio(path, saved.config.mel.sample_rate_hz)
    except DataError as error:
        return Answer(path, None, str(error))
    device, window = saved.model.mel.mean.device, saved.config.clip_samples
    _, starts = cut_windows(np.array([max(len(samples) - window, 0)]), window)
    samples = np.pad(samples, (0, max(window - len(samples), 0)))
    parts = []
    with torch.inference_mode(), autocast(saved.config, device):
        for first in range(0, len(starts), WINDOWS_AT_ONCE):  # all at once would take an hour's floats
            some = starts[first : first + WINDOWS_AT_ONCE].tolist()
            windows = np.stack([samples[start : start + window] for start in some])  # (batch, window)
            parts.append(function(to_float(windows, device)).float())
    return Answer(path, torch.cat(parts).mean(0).cpu().numpy())


def _probabilities(saved: Saved, waveform: Float[Tensor, "batch time"]) -> Float[Tensor, "batch label"]:
    logits = saved.model(waveform).float()
    return logits.sigmoid() if saved.labels.multi_label else logits.softmax(1)
