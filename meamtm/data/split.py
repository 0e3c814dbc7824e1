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
    """Splits by the data set's own `split` column if it has one, by `data.test_fold` and `data.valid_fold` otherwise.

    DataError when a fold does not exist, a class has no clip to train on, or a group would be in two parts.
    """
    if clips.has_split:
        given = np.array(clips.splits, object)
        parts = [given == name for name in ("train", "valid", "test")]
    else:
        test, valid = _fold(clips, data, "test_fold"), _fold(clips, data, "valid_fold")
        parts = [~(test | valid), valid & ~test, test]
    _check_classes(clips, parts[0], data)
    _check_groups(clips, parts, data)
    return Split(*(np.flatnonzero(part) for part in parts))


def held_out(clips: Clips, data: DataConfig) -> Int64[np.ndarray, " test"]:
    """Gives the clips of `data.test_fold` in a set on which nothing trains."""
    return np.flatnonzero(_fold(clips, data, "test_fold"))


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
    there = clips.targets.any(axis=0)  # (label,)
    if not there.all():
        names = ", ".join(clips.classes[label] for label in np.flatnonzero(~there))
        raise DataError(
            f"data.path={data.path}: has no clip of the class {names}, of which none could be used (rejected.csv there "
            "says why); add clips, or leave the class out, and pack again"
        )
    num_heard = clips.targets[train].sum(axis=0)  # (label,)
    if not num_heard.all():
        names = ", ".join(clips.classes[label] for label in np.flatnonzero(num_heard == 0))
        if not num_heard.any() and not clips.has_split:
            raise DataError(
                f"data.path={data.path}: no clip is left to train on with data.test_fold={data.test_fold} and "
                f"data.valid_fold={data.valid_fold} held out; set one of them to null, or pack the set with more folds"
            )
        remedy = (
            "in the split that the data set has; pack it with clips of it in `train`"
            if clips.has_split
            else f"(data.test_fold={data.test_fold}, data.valid_fold={data.valid_fold}); add clips of it, leave "
            "the class out and pack again, or hold out another fold"
        )
        raise DataError(f"data.path={data.path}: no training clip has the class {names} {remedy}")


def _check_groups(clips: Clips, parts: Sequence[Bool[np.ndarray, " clip"]], data: DataConfig) -> None:
    """Packing keeps groups together; a data set from elsewhere might not."""
    groups = clips.groups
    num_parts = np.zeros(len(clips), np.int8)  # (group,), of which there are as many as clips at most
    for part in parts:
        num_parts[np.unique(groups[part])] += 1
    torn = np.flatnonzero(num_parts[groups] > 1)  # clips
    if len(torn):
        name = clips.table.column("group")[int(torn[0])].as_py()
        raise DataError(
            f"data.path={data.path}: group={name} would be heard in training and in a test; give its clips one "
            + ("split" if clips.has_split else "fold")
        )
