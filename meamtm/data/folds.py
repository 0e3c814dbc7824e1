"""Clips without folds -> five folds, stratified by class, that keep groups together; the same ones every time."""

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Int16

from meamtm.data.sources import Entry

NUM_FOLDS = 5


def assign_folds(entries: Sequence[Entry]) -> list[Entry]:
    """Gives clips without folds five, stratified by class, that keep groups together; the same ones every time."""
    if all(entry.fold is not None for entry in entries):
        return list(entries)
    counts = Counter(label for entry in entries for label in entry.labels)
    rarest = [min(entry.labels, key=lambda label: (counts[label], label)) for entry in entries]
    groups = [entry.group for entry in entries]
    num_folds = min(NUM_FOLDS, len(set(groups)), max(Counter(rarest).values()))
    if num_folds < 2:
        return [replace(entry, fold=1) for entry in entries]
    folds = _deal_folds(num_folds, rarest, groups)
    return [replace(entry, fold=int(fold)) for entry, fold in zip(entries, folds, strict=True)]


def _deal_folds(num_folds: int, labels: list[str], groups: list[str]) -> Int16[np.ndarray, " clip"]:
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold  # takes a second to import

    # With groups it looks at one after the other, which takes minutes for a million clips, each on its own.
    is_grouped = len(set(groups)) < len(groups)
    kind = StratifiedGroupKFold if is_grouped else StratifiedKFold
    folds = np.zeros(len(labels), np.int16)
    with warnings.catch_warnings():
        # A class with fewer clips than folds is missing from some of them; splitting refuses it where that matters.
        warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
        deal = kind(num_folds, shuffle=True, random_state=0).split(folds, labels, groups if is_grouped else None)
        for fold, (_, held_out) in enumerate(deal, start=1):
            folds[held_out] = fold
    return folds
