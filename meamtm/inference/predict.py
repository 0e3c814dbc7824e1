"""Audio files and a checkpoint, or several -> probabilities or embeddings, file by file or window by window."""

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import soundfile
import torch
from jaxtyping import Float, Float32, Int16, Shaped
from torch import Tensor

from meamtm.config import flatten
from meamtm.data.audio import read_audio
from meamtm.data.loader import cut_windows
from meamtm.data.sources import AUDIO_SUFFIXES, find_sounds
from meamtm.errors import DataError
from meamtm.model.precision import autocast
from meamtm.training.checkpoint import Labels, Saved, checkpoint_in
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
    for path in (path.expanduser() for path in paths):
        if path.is_dir():
            sounds = find_sounds(path)
            if not sounds and checkpoint_in(path) is not None:
                raise DataError(
                    f"{path}: is a run, and holds no sounds; the first word alone names runs, several of them as a "
                    "pattern in quotes"
                )
            found += sounds
        elif path.exists():
            found.append(path)
        else:
            raise DataError(f"{path}: no such file or folder; name audio files or folders of them")
    if not found:
        raise DataError(
            f"{', '.join(map(str, paths))}: no {', '.join(sorted(AUDIO_SUFFIXES))} file in there; name another folder"
        )
    return found


def classify_samples(
    models: Saved | Sequence[Saved], samples: Shaped[np.ndarray, "..."], rate_hz: int
) -> Float32[np.ndarray, " label"]:
    """Gives the probabilities of a sound in memory as `classify_files` gives those of a file: of one channel, at any
    rate and of any length, floats in -1..1, int16 or int32. Raises DataError where there is nothing to hear, and for
    other shapes and types."""
    kinds = {"int16": "PCM_16", "int32": "PCM_32", "float16": "FLOAT", "float32": "FLOAT", "float64": "FLOAT"}
    if samples.ndim != 1 or samples.dtype.name not in kinds:
        raise DataError(
            f"samples: {samples.dtype.name} of shape {samples.shape}; give one channel, as floats in -1..1, int16 or "
            "int32"
        )
    subtype = kinds[samples.dtype.name]
    samples = samples.astype(np.float32 if subtype == "FLOAT" else samples.dtype.newbyteorder("="))
    content = io.BytesIO()
    soundfile.write(content, samples, int(rate_hz), format="WAV", subtype=subtype)
    ensemble = [models] if isinstance(models, Saved) else models
    heard = _hear(ensemble, Path("samples"), _probabilities, _evenly, content.getvalue())
    answer = _mean([_mean(windows) for windows in heard])
    if answer.values is None:
        raise DataError(f"samples: {answer.problem}")
    return answer.values


def classify_files(models: Saved | Sequence[Saved], paths: Sequence[Path]) -> Iterator[Answer]:
    """Gives each file's probabilities (label,), the mean over windows of the length that the model was trained on; of
    several models, an ensemble, the mean over these."""
    ensemble = [models] if isinstance(models, Saved) else models
    return (_mean([_mean(windows) for windows in _hear(ensemble, path, _probabilities, _evenly)]) for path in paths)


def classify_windows(models: Saved | Sequence[Saved], paths: Sequence[Path]) -> Iterator[list[Answer]]:
    """Gives the probabilities (label,) of each file's windows: one after the other, the last one up to its end; of
    several models, an ensemble, their mean.

    Raises DataError where the models' windows differ."""
    ensemble = [models] if isinstance(models, Saved) else models
    for other in ensemble[1:]:
        for key in ("data.clip_s", "mel.sample_rate_hz"):
            mine, its = (flatten(saved.config)[key] for saved in (ensemble[0], other))
            if mine != its:
                raise DataError(
                    f"--each-window: {ensemble[0].folder} has {key}={mine}, and {other.folder} {its}, so their windows "
                    "differ; leave --each-window out, or name runs that have the same"
                )
    heard = (_hear(ensemble, path, _probabilities, _in_turn) for path in paths)
    return ([replace(_mean(each), span_s=each[0].span_s) for each in zip(*file, strict=True)] for file in heard)


def embed_files(saved: Saved, paths: Sequence[Path]) -> Iterator[Answer]:
    """Gives each file's embedding (width,), the mean over its windows."""
    return (_mean(windows) for path in paths for windows in _hear([saved], path, _features, _evenly))


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
    ensemble: Sequence[Saved],
    path: Path,
    function: Callable[[Saved, Tensor], Tensor],
    cut: Callable[[int, int], list[int]],
    content: bytes | None = None,
) -> list[list[Answer]]:
    """Gives for each model an answer for each window of a file, or of what would be in it; or one answer that says why
    it cannot be heard."""
    rates_hz = {saved.config.mel.sample_rate_hz for saved in ensemble}
    try:
        sounds = {rate_hz: read_audio(content or path, rate_hz)[0] for rate_hz in rates_hz}
    except DataError as error:
        return [[Answer(path, None, str(error))]]
    return [_windows(saved, path, sounds[saved.config.mel.sample_rate_hz], function, cut) for saved in ensemble]


def _windows(
    saved: Saved,
    path: Path,
    samples: Int16[np.ndarray, " time"],
    function: Callable[[Saved, Tensor], Tensor],
    cut: Callable[[int, int], list[int]],
) -> list[Answer]:
    """Gives one model's answer for each window of a sound."""
    rate_hz = saved.config.mel.sample_rate_hz
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


def _mean(answers: Sequence[Answer]) -> Answer:
    """Makes one answer of those of a file's windows, or of several models."""
    values = [answer.values for answer in answers if answer.values is not None]
    assert len(values) in (0, len(answers)), "a file can be read, or it cannot"
    return Answer(answers[0].path, np.mean(values, axis=0) if values else None, answers[0].problem)


def _features(saved: Saved, waveform: Float[Tensor, "batch time"]) -> Float[Tensor, "batch width"]:
    return saved.model.features(waveform)


def _probabilities(saved: Saved, waveform: Float[Tensor, "batch time"]) -> Float[Tensor, "batch label"]:
    logits = saved.model(waveform).float()
    return logits.sigmoid() if saved.labels.multi_label else logits.softmax(1)
