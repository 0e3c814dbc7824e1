"""Clips -> batches of waveforms, dealt to ranks.

The order of an epoch is a function of (seed, epoch) alone. Its global batches differ in size by one clip at most, and
rank r takes the r-th of every `world_size` clips of each. So every clip is heard exactly once (where few clips are to
make many batches, equally often), all ranks take as many steps, and the two integers (epoch, batch) are the whole
cursor.

Memory is reused: rows are copied into a buffer that nobody refers to any more, because fresh pages cost more than the
copy. A batch that is kept stays as it is, and then the next one gets a buffer of its own."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Float32, Int16, Int64

from meamtm.data.clips import Clips, Numbers
from meamtm.data.stream import KEPT_ROW_GROUPS
from meamtm.errors import ConfigError, DataError

MAX_BUFFERS = 4
UNUSED = 2
"""What sys.getrefcount gives for an array that only the list of buffers refers to."""


@dataclass(frozen=True)
class Batch:
    """One rank's part of a global batch of `num_global` clips."""

    waveform: Int16[np.ndarray, "batch time"]
    target: Float32[np.ndarray, "batch label"]
    index: Int64[np.ndarray, " batch"]
    num_global: int


class Loader:
    """Deals clips to one rank, `clip_samples` at a time.

    Training hears each clip once per epoch, cropped at random when it is longer; where that makes less than
    `least_batches`, it passes through all clips as often as it takes. Evaluation keeps the order and cuts a longer clip
    into evenly spaced windows, `most_windows` at most, so that `Batch.index` may name a clip several times; a rank's
    part of a small batch may be empty.
    """

    def __init__(
        self,
        clips: Clips,
        indices: Int64[np.ndarray, " index"],
        clip_samples: int,
        batch_size: int,
        *,
        seed: int,
        train: bool,
        least_batches: int = 1,
        most_windows: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._clips, self._clip_samples, self._seed = clips, clip_samples, seed
        self._rank, self._world_size = rank, world_size
        spare = np.maximum(clips.num_samples[indices] - clip_samples, 0)  # samples beyond what is heard at once
        self._train, self._indices, self._spare = train, indices, spare
        if not train:
            counts, self._starts = cut_windows(spare, clip_samples, most_windows)
            self._indices = np.repeat(indices, counts)
        least_heard = (least_batches - 1) * batch_size + 1
        self._num_passes = max(1, -(-least_heard // max(len(self._indices), 1))) if train else 1
        self.num_heard = self._num_passes * len(self._indices)
        """Clips of an epoch, over all ranks; windows, where it evaluates."""
        self.num_batches = -(-self.num_heard // batch_size)
        _check(self.num_heard, batch_size, self.num_batches, world_size if train else 1)
        self._edges = np.arange(self.num_batches + 1) * self.num_heard // self.num_batches
        self._targets = clips.targets
        self._buffers: list[Int16[np.ndarray, "batch time"]] = []

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yields the batches of an epoch from number `start` on."""
        for indices, starts, num_global in self.plan(epoch, start):
            waveform = self._buffer()[: len(indices)]
            self._clips.waveforms.fill(indices, starts, waveform)
            yield Batch(waveform, self._targets[indices], indices, num_global)

    def plan(self, epoch: int, start: int = 0) -> Iterator[tuple[Numbers, Numbers, int]]:
        """Yields what each batch will be, before any sound is read: clips, their first samples, the global size."""
        indices, starts = self._deal(epoch)
        for low, high in pairwise(self._edges[start:].tolist()):
            mine = slice(low + self._rank, high, self._world_size)
            yield indices[mine], starts[mine], high - low

    def _deal(self, epoch: int) -> tuple[Int64[np.ndarray, " heard"], Int64[np.ndarray, " heard"]]:
        """Clips in the order of an epoch, and the sample from which each is heard."""
        if not self._train:
            return self._indices, self._starts
        pools, rng = self._clips.waveforms.pools(), np.random.default_rng((self._seed, epoch, 0))
        order = np.concatenate([_shuffle(pools, self._indices, rng) for _ in range(self._num_passes)])
        indices = self._indices[order]
        if not self._spare.any():
            return indices, np.zeros_like(indices)
        size = (self._num_passes, len(self._clips))
        where = np.random.default_rng((self._seed, epoch, 1)).random(size)  # by clip, so by no rank
        number = np.repeat(np.arange(self._num_passes), len(self._indices))  # (heard,): of its pass
        return indices, (where[number, indices] * (self._spare[order] + 1)).astype(np.int64)

    def _buffer(self) -> Int16[np.ndarray, "batch time"]:
        """A buffer that no batch, array or tensor refers to."""
        for place in range(len(self._buffers)):
            if sys.getrefcount(self._buffers[place]) == UNUSED:
                return self._buffers[place]
        most = -(-int(np.diff(self._edges).max()) // self._world_size)
        buffer = np.empty((most, self._clip_samples), np.int16)
        self._buffers = [*self._buffers[-MAX_BUFFERS + 1 :], buffer]
        return buffer


def cut_windows(
    spare: Int64[np.ndarray, " clip"], clip_samples: int, most: int | None = None
) -> tuple[Int64[np.ndarray, " clip"], Int64[np.ndarray, " window"]]:
    """Cuts clips, each `spare` samples longer than a window, into evenly spaced windows, so many at most.

    Gives how many each clip has, and where they begin. The last one ends where its clip does."""
    missed = spare - clip_samples // 10  # a tenth of a window may go unheard: 5.02 s are not worth two windows of 5 s
    counts = 1 + np.maximum(-(-missed // clip_samples), 0)  # (clip,)
    counts = counts if most is None else np.minimum(counts, most)
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # (window,): 0, 1, .. of its clip
    last = np.repeat(counts - 1, counts)  # (window,): number of its clip's last window
    spare = np.repeat(spare, counts)  # (window,)
    starts = np.where(last == 0, spare // 2, spare * number // np.maximum(last, 1))
    return counts, starts


def _shuffle(
    pools: Int64[np.ndarray, " clip"] | None, indices: Int64[np.ndarray, " index"], rng: np.random.Generator
) -> Int64[np.ndarray, " index"]:
    """A random order; where reading order matters, clips mix within a bounded number of row groups dealt like cards."""
    order = rng.permutation(len(indices))
    if pools is None:
        return order
    places = rng.permutation(pools.max() + 1) // KEPT_ROW_GROUPS  # (row group,)
    return order[np.argsort(places[pools[indices[order]]], kind="stable")]


def _check(num_heard: int, batch_size: int, num_batches: int, world_size: int) -> None:
    """Every rank must get a clip of every batch."""
    if num_heard == 0:
        raise DataError("no clip is left to be heard; check data.test_fold and data.valid_fold")
    if num_heard < world_size:
        raise DataError(
            f"{num_heard} clips cannot be dealt to scale.workers={world_size}; add clips or lower scale.workers"
        )
    if num_heard // num_batches < world_size:
        raise ConfigError(
            f"train.batch_size={batch_size} makes batches of {num_heard // num_batches} clips, fewer than "
            f"scale.workers={world_size}; raise train.batch_size or lower scale.workers"
        )
