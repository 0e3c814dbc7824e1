"""Audio files and a checkpoint, or several -> probabilities or embeddings, file by file or window by window."""

import csv
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from meamtm.config import ScaleConfig
from meamtm.data.audio import read_audio
from meamtm.data.loader import cut_windows
from meamtm.data.sources import AUDIO_SUFFIXES, find_sounds
from meamtm.errors import CheckpointError, DataError
from meamtm.model.precision import autocast
from meamtm.training.checkpoint import Labels, Saved, load_model, newest
from meamtm.training.context import choose_device
from meamtm.training.predictions import name_labels
from meamtm.training.prepare import to_float

WINDOWS_AT_ONCE = 32


@dataclass(frozen=True)
class Answer:
    """What one file gave, or one window of it: numbers, or the reason why not."""

    path: Path
    values: Float32[np.ndarray, " value"] | None
    problem: str = ""
    span_s: tuple[float, float] | None = None
    """Where a window begins and ends; None for a file as a whole."""


def find_audio(paths: Sequence[Path]) -> list[Path]:
    """Lists the audio files among paths and inside folders, in a fixed order; DataError if there is none."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += find_sounds(path) or _no_run(path)
        elif path.exists():
            found.append(path)
        else:
            raise DataError(f"{path}: no such file or folder; name audio files or folders of them")
    if not found:
        raise DataError(
            f"{', '.join(map(str, paths))}: no {', '.join(sorted(AUDIO_SUFFIXES))} file in there; name another folder"
        )
    return found


def load_here(folder: Path) -> Saved:
    """Reads a model back, as `load_model` does, onto this machine's GPU if it has one."""
    saved = load_model(folder)
    saved.model.to(choose_device(ScaleConfig()))
    return saved


def load_models(place: Path) -> list[Saved]:
    """Reads the model of a run or checkpoint folder, or those of all runs that a pattern such as runs/mine-* matches.

    Matches without a checkpoint, such as the result of a cross-validation, are left out. Raises CheckpointError where
    nothing is left, or models name different classes.
    """
    folders = [] if place.exists() or not place.name else sorted(place.parent.glob(place.name))
    models = [load_here(folder) for folder in folders if newest(folder, to_train=False) is not None]
    if not models:
        return [load_here(place)]
    first = models[0]
    for other in models[1:]:
        if other.labels.classes != first.labels.classes or other.labels.multi_label != first.labels.multi_label:
            raise CheckpointError(
                f"{place}: {first.folder} and {other.folder} name different classes; name runs of one data set"
            )
    return models


def average(models: Sequence[Iterable[list[Answer]]]) -> Iterator[list[Answer]]:
    """Gives, file by file, the mean of what several models say of it or of each of its windows.

    Raises DataError where they cut a file into windows of different lengths."""
    for said in zip(*models, strict=True):
        first = said[0]
        if any([answer.span_s for answer in one] != [answer.span_s for answer in first] for one in said):
            raise DataError(f"{first[0].path}: the models differ in data.clip_s, so their windows cannot be averaged")
        yield [replace(answers[0], values=_mean_values(answers)) for answers in zip(*said, strict=True)]


def classify_files(saved: Saved, paths: Sequence[Path]) -> Iterator[Answer]:
    """Gives each file's probabilities (label,), the mean over windows of the length that the model was trained on."""
    return (_mean(_hear(saved, path, _probabilities, _evenly)) for path in paths)


def classify_windows(saved: Saved, paths: Sequence[Path]) -> Iterator[list[Answer]]:
    """Gives the probabilities (label,) of each file's windows: one after the other, the last one up to its end."""
    return (_hear(saved, path, _probabilities, _in_turn) for path in paths)


def embed_files(saved: Saved, paths: Sequence[Path]) -> Iterator[Answer]:
    """Gives each file's embedding (width,), the mean over its windows."""
    return (_mean(_hear(saved, path, _features, _evenly)) for path in paths)


def check_any(answers: Sequence[Answer]) -> None:
    """Raises DataError if not a single file could be read."""
    if all(answer.values is None for answer in answers):
        first = answers[0]
        others = "" if len(answers) == 1 else f" (nor can the other {len(answers) - 1} files be used)"
        raise DataError(f"{first.path}: {first.problem}{others}; name files with sound in them")


def write_csv(out: Path, labels: Labels, answers: Sequence[Answer]) -> None:
    """Writes one line per file, or per window with its begin and end in seconds: its class, or, where a clip may have
    several, all that are above one half, separated by `;`; every class's probability; and what was wrong with it."""
    classes = labels.classes
    has_spans = any(answer.span_s for answer in answers)
    with out.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        writer.writerow(["path", *(("start_s", "end_s") if has_spans else ()), "class", *classes, "problem"])
        for answer in answers:
            span = [f"{time_s:.3f}" for time_s in answer.span_s] if answer.span_s else [""] * 2 * has_spans
            if answer.values is None:
                writer.writerow([answer.path, *span, "", *[""] * len(classes), answer.problem])
            else:
                named = name_labels(answer.values, classes, multi_label=labels.multi_label)
                writer.writerow([answer.path, *span, named, *(f"{value:.6f}" for value in answer.values), ""])


def write_npz(out: Path, answers: Sequence[Answer]) -> int:
    """Writes paths (file,) and embeddings (file, width) of the readable files, and returns their number."""
    good = [(str(answer.path), answer.values) for answer in answers if answer.values is not None]
    with out.open("wb") as file:
        np.savez(file, path=[path for path, _ in good], embedding=np.stack([values for _, values in good]))
    return len(good)


def _hear(
    saved: Saved, path: Path, function: Callable[[Saved, Tensor], Tensor], cut: Callable[[int, int], list[int]]
) -> list[Answer]:
    """Gives an answer for each window of a file, or one that says why it cannot be heard."""
    rate_hz = saved.config.mel.sample_rate_hz
    try:
        samples, _ = read_audio(path, rate_hz)
    except DataError as error:
        return [Answer(path, None, str(error))]
    device, window, num_samples = saved.model.mel.mean.device, saved.config.clip_samples, len(samples)
    starts = cut(max(num_samples - window, 0), window)
    samples = np.pad(samples, (0, max(window - num_samples, 0)))
    parts = []
    with torch.inference_mode(), autocast(saved.config, device):
        for first in range(0, len(starts), WINDOWS_AT_ONCE):  # all at once would take an hour's floats
            some = starts[first : first + WINDOWS_AT_ONCE]
            windows = np.stack([samples[start : start + window] for start in some])  # (batch, window)
            parts.append(function(saved, to_float(windows, device)).float())
    spans_s = [(start / rate_hz, min(start + window, num_samples) / rate_hz) for start in starts]
    values = torch.cat(parts).cpu().numpy()  # (window, value)
    return [Answer(path, each, "", span_s) for each, span_s in zip(values, spans_s, strict=True)]


def _evenly(spare: int, window: int) -> list[int]:
    """Begins of windows that are spread as a test spreads them, over a file `spare` samples longer than one."""
    return cut_windows(np.array([spare]), window)[1].tolist()


def _in_turn(spare: int, window: int) -> list[int]:
    """Begins of windows that follow each other; the last one ends where the file does."""
    return [*range(0, spare, window), spare]


def _mean(windows: list[Answer]) -> Answer:
    """Makes one answer of those of a file's windows."""
    return Answer(windows[0].path, _mean_values(windows), windows[0].problem)


def _mean_values(answers: Sequence[Answer]) -> Float32[np.ndarray, " value"] | None:
    """Gives the mean of answers that all have numbers, or that all have none."""
    values = [answer.values for answer in answers if answer.values is not None]
    return np.mean(values, axis=0) if values else None


def _no_run(folder: Path) -> list[Path]:
    """Refuses a run among the folders of sounds: the shell has put it in the place of a pattern."""
    if newest(folder, to_train=False) is not None:
        raise DataError(f"{folder}: is a run, and holds no sounds; put a pattern of runs in quotes, to average them")
    return []


def _features(saved: Saved, waveform: Float[Tensor, "batch time"]) -> Float[Tensor, "batch width"]:
    return saved.model.features(waveform)


def _probabilities(saved: Saved, waveform: Float[Tensor, "batch time"]) -> Float[Tensor, "batch label"]:
    logits = saved.model(waveform).float()
    return logits.sigmoid() if saved.labels.multi_label else logits.softmax(1)
