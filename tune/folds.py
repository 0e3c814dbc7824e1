"""Runs that validate on one fold each -> the epochs of one trial, which is worth their mean."""

import statistics
from collections.abc import Mapping
from typing import Any


class Folds:
    """Counts on through a trial's folds, one after the other. With one fold, everything stays as the run tells it."""

    def __init__(self, metric: str, epochs: int) -> None:
        self._metric, self._epochs = metric, epochs
        self._ended: tuple[float, ...] = ()
        self._hits = ""

    def epoch(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """An epoch of the fold at hand, as one of the trial's: counted on, its objective the mean over folds so far."""
        epoch = metrics["epoch"] + len(self._ended) * self._epochs
        values = [*self._ended, *([metrics[self._metric]] if self._metric in metrics else [])]
        return {**metrics, "epoch": epoch} | ({self._metric: statistics.fmean(values)} if values else {})

    def end(self, metrics: Mapping[str, Any], hits: str = "") -> dict[str, Any]:
        """The last epoch of the fold at hand, with which clips were named right (1 or 0 each) in all folds so far."""
        self._hits += hits
        found = self.epoch(metrics) | ({"hits": self._hits} if self._hits else {})
        if self._metric in metrics:
            self._ended = (*self._ended, metrics[self._metric])
        return found
