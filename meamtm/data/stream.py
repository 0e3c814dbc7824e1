"""Waveforms decoded on demand, for sets larger than the disk: nothing is written, little is kept."""

from functools import lru_cache

import numpy as np
from jaxtyping import Int16, Int64

from meamtm.data.audio import read_audio
from meamtm.data.clips import Numbers
from meamtm.data.packed import Packed

KEPT_ROW_GROUPS = 8
"""Encoded row groups that stay in memory (64 clips, about 5 MB each); an epoch shuffles within as many."""


class StreamedWaveforms:
    """Reads row groups of a packed data set, keeps the last few, decodes what is asked for."""

    def __init__(self, packed: Packed, row_groups: Int64[np.ndarray, " clip"], sample_rate_hz: int) -> None:
        self._row_groups, self._sample_rate_hz = row_groups, sample_rate_hz
        self._first_clip = np.searchsorted(row_groups, np.arange(packed.num_row_groups))
        self._sounds = lru_cache(maxsize=KEPT_ROW_GROUPS)(packed.sounds)

    def waveform(self, clip: int) -> Int16[np.ndarray, " time"]:
        """Decodes one clip."""
        row_group = int(self._row_groups[clip])
        encoded = self._sounds(row_group)[clip - self._first_clip[row_group]]
        return read_audio(encoded, self._sample_rate_hz)[0]

    def fill(self, clips: Numbers, starts: Numbers, rows: Int16[np.ndarray, "batch time"]) -> None:
        """Decodes each clip and copies its part."""
        for clip, start, row in zip(clips.tolist(), starts.tolist(), rows, strict=True):
            heard = self.waveform(clip)[start : start + len(row)]
            row[: len(heard)] = heard
            row[len(heard) :] = 0

    def pools(self) -> Int64[np.ndarray, " clip"]:
        """The row group of each clip."""
        return self._row_groups
