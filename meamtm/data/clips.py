"""The table and the waveforms of an opened data set, as training reads them.

A `Clips` is two things: an Arrow table of small facts, one row per clip, and something that gives waveforms. Columns
are views of the table, so that nothing here grows with the data set when the table is memory-mapped."""

import os
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Int16, Int64

Waveform = Int16[np.ndarray, " time"]
Numbers = Int64[np.ndarray, " batch"]


@runtime_checkable
class Waveforms(Protocol):
    """Where samples come from."""

    def waveform(self, clip: int) -> Waveform:
        """All samples of one clip, not to be written to."""
        ...

    def fill(self, clips: Numbers, starts: Numbers, rows: Int16[np.ndarray, "batch time"]) -> None:
        """Copies each clip from its start on into its row; what follows its end becomes zero."""
        ...

    def pools(self) -> Int64[np.ndarray, " clip"] | None:
        """A number for each clip such that clips of one number are cheap to read together; None: any order is cheap."""
        ...


@dataclass(frozen=True)
class Clips:
    """A data set at one sample rate."""

    table: pa.Table
    waveforms: Waveforms
    classes: tuple[str, ...]
    multi_label: bool
    digest: str
    sample_rate_hz: int

    def __len__(self) -> int:
        return len(self.table)

    def waveform(self, clip: int) -> Waveform:
        """All samples of one clip, not to be written to."""
        return self.waveforms.waveform(clip)

    @property
    def num_samples(self) -> Int64[np.ndarray, " clip"]:
        """Length of each clip at this sample rate."""
        return self.table.column("num_samples").to_numpy()

    @property
    def targets(self) -> Float32[np.ndarray, "clip label"]:
        """One or more ones per clip."""
        values = self.table.column("target").chunk(0).flatten()
        return values.to_numpy(zero_copy_only=True).reshape(len(self), len(self.classes))

    @property
    def folds(self) -> Int16[np.ndarray, " clip"]:
        """The fold of each clip."""
        return self.table.column("fold").to_numpy()

    @property
    def groups(self) -> Int64[np.ndarray, " clip"]:
        """A number for each clip that clips of one group share."""
        codes = self.table.column("group").chunk(0).dictionary_encode().indices
        return codes.to_numpy(zero_copy_only=False).astype(np.int64)

    @property
    def splits(self) -> list[str | None]:
        """`train`, `valid`, `test` or None for each clip."""
        return self.table.column("split").to_pylist()

    @property
    def has_split(self) -> bool:
        """Whether the data set came with a split of its own; folds then decide nothing."""
        return self.table.column("split").null_count < len(self)

    @property
    def ids(self) -> list[str]:
        """The name of each clip."""
        return self.table.column("clip_id").to_pylist()


class MappedWaveforms:
    """Waveforms that lie one after the other in a file.

    One clip is a view of the mapped file. Batches are read from the page cache straight into their rows instead, which
    is as fast and keeps even the mapped part of a process's memory from growing (measured: see benchmarks/loader.py).
    """

    def __init__(self, path: Path, starts: Int64[np.ndarray, " clip"], num_samples: Int64[np.ndarray, " clip"]) -> None:
        self._samples = np.asarray(
            np.memmap(path, dtype=np.int16, mode="r", shape=path.stat().st_size // 2)
        )  # a plain view slices 5x faster
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        self._starts, self._num_samples = starts, num_samples

    def waveform(self, clip: int) -> Waveform:
        """A view of the mapped file."""
        start = self._starts[clip]
        return self._samples[start : start + self._num_samples[clip]]

    def fill(self, clips: Numbers, starts: Numbers, rows: Int16[np.ndarray, "batch time"]) -> None:
        """Reads each row from the page cache."""
        num_heard = np.minimum(self._num_samples[clips] - starts, rows.shape[1])  # (batch,)
        first_byte = 2 * (self._starts[clips] + starts)  # (batch,)
        for row, length, place in zip(rows, num_heard.tolist(), first_byte.tolist(), strict=True):
            num_bytes = os.preadv(self._descriptor, [row[:length]], place)
            assert num_bytes == 2 * length, "the cache file is shorter than its table says"
            row[length:] = 0

    def pools(self) -> None:
        """Any order is cheap."""
        return
