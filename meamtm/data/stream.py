"""Waveforms decoded on demand, for sets larger than the disk: nothing is written, little is kept."""

from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial

import numpy as np
import pyarrow as pa
from jaxtyping import Int16, Int64

from meamtm.data.audio import num_cores
from meamtm.data.clips import Numbers
from meamtm.data.packed import Packed

KEPT_ROW_GROUPS = 8
"""Encoded row groups that stay in memory (64 clips, about 5 MB each); an epoch shuffles within as many."""


class StreamedWaveforms:
    """Reads row groups of a packed data set, keeps the last few, decodes what is asked for."""

    def __init__(self, packed: Packed, table: pa.Table, sample_rate_hz: int) -> None:
        self._row_groups = table.column("row_group").to_numpy().astype(np.int64)
        self._clip_ids = table.column("clip_id")
        self._first_clip = np.searchsorted(self._row_groups, np.arange(packed.num_row_groups))
        self._decode = partial(packed.decode, sample_rate_hz)
        self._sounds = lru_cache(maxsize=KEPT_ROW_GROUPS)(packed.sounds)
        self._threads = ThreadPoolExecutor(num_cores(), thread_name_prefix="decode")

    def waveform(self, clip: int) -> Int16[np.ndarray, " time"]:
        """Decodes one clip."""
        return self._decode(*self._sound(clip))

    def fill(self, clips: Numbers, starts: Numbers, rows: Int16[np.ndarray, "batch time"]) -> None:
        """Decodes each clip, once for all of its windows, and copies its parts."""
        places = defaultdict(list)
        for row, clip in enumerate(clips.tolist()):
            places[clip].append(row)
        sounds = [self._sound(clip) for clip in places]
        list(self._threads.map(partial(self._fill_rows, starts, rows), sounds, places.values()))

    def pools(self) -> Int64[np.ndarray, " clip"]:
        """The row group of each clip."""
        return self._row_groups

    def _sound(self, clip: int) -> tuple[str, bytes]:
        """The name of a clip and its encoded sound."""
        row_group = int(self._row_groups[clip])
        return self._clip_ids[clip].as_py(), self._sounds(row_group)[clip - int(self._first_clip[row_group])]

    def _fill_rows(
        self, starts: Numbers, rows: Int16[np.ndarray, "batch time"], sound: tuple[str, bytes], places: Sequence[int]
    ) -> None:
        waveform = self._decode(*sound)
        for place in places:
            row, start = rows[place], int(starts[place])
            heard = waveform[start : start + len(row)]
            row[: len(heard)] = heard
            row[len(heard) :] = 0
