"""Folds, or a split that came with the data -> which clips train, which choose, which test."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int64

from meamtm.config import DataConfig
from meamtm.data.clips import Clips
from meamtm.errors import DataError


@dataclass(frozen=True)
class Split:
    """Clip numbers, in order; no clip and no group is in two of them."""

    train: Int64[np.ndarray, " train"]
    valid: Int64[np.ndarray, " valid"]
    test: Int64[np.ndarray, " test"]


def split_clips(clips: Clips, data: DataConfig) -> Split:
    """Splits by the data set's own `split` column where it has one, by `data.test_fold` and `data.valid_fold` otherwise.

    DataError when a fold does not exist, a class has no clip to train on, or a group would be in two parts.
    """
    given = np.array(clips.splits, dtype=object)
    if (given != None).any():  # noqa: E711  (element by element)
        parts = [given == name for name in ("train", "valid", "test")]
    else:
        test, valid = _fold(clips, data, "test_fold"), _fold(clips, data, "valid_fold")
        parts = [~(test | valid), valid & ~test, test]
    _check_classes(clips, parts[0], data)
    _check_groups(clips, parts, data)
    return Split(*(np.flatnonzero(part) for part in parts))


def _fold(clips: Clips, data: DataConfig, key: str) -> Bool[np.ndarray, " clip"]:
    fold = getattr(data, key)
    folds = clips.folds
    if fold is None:
        return np.zeros(len(clips), bool)
    if fold not in folds:
        there = ", ".join(map(str, np.unique(folds)))
        raise DataError(f"data.{key}={fold}: {data.path} has no such fold; choose one of {there}, or null")
    return folds == fold


def _check_classes(clips: Clips, train: Bool[np.ndarray, " clip"], data: DataConfig) -> None:
    heard = clips.targets[train].any(axis=0)  # (label,)
    if not heard.all():
        names = ", ".join(name for name, there in zip(clips.classes, heard, strict=True) if not there)
        raise DataError(
            f"data.path={data.path}: no training clip has the class {names} (data.test_fold={data.test_fold}, "
            f"data.valid_fold={data.valid_fold}); add clips of it, or hold out another fold"
        )


def _check_groups(clips: Clips, parts: Sequence[Bool[np.ndarray, " clip"]], data: DataConfig) -> None:
    """Packing keeps groups together; a data set from elsewhere might not."""
    groups = clips.groups
    times = sum(np.bincount(groups[part], minlength=groups.max() + 1) > 0 for part in parts)
    if (times > 1).any():
        first = int(np.flatnonzero(groups == np.argmax(times > 1))[0])
        name = clips.table.column("group")[first].as_py()
        raise DataError(
            f"data.path={data.path}: group={name} would be heard in training and in a test; give its clips one fold"
        )
