"""A packed data set, local or at any pyarrow URI -> its card, its table of clips, its encoded sounds.

docs/data-format.md describes the files. Only the footer and the columns asked for are read."""

import functools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
from jaxtyping import Int16
from pydantic import TypeAdapter

from meamtm.config import is_uri
from meamtm.data.audio import read_audio
from meamtm.errors import DataError

FORMAT = 1
CARD = "card.json"


@dataclass(frozen=True)
class Card:
    """What a data set is, without opening it."""

    classes: tuple[str, ...]
    multi_label: bool
    num_clips: int
    num_rejected: int
    folds: tuple[int, ...]
    rates_hz: tuple[int, ...]
    total_s: float
    digest: str
    shards: tuple[str, ...]
    source: str
    num_groups: int | None = None
    """Of recordings, animals or the like that clips share; None in a set of an earlier version."""
    has_split: bool = False
    """Whether clips say which train, validate and test, so that folds decide nothing."""
    warnings: tuple[str, ...] = ()
    """What whoever packed it should know, such as copies that a test would hear again."""
    format: int = FORMAT

    def to_json(self) -> str:
        """The text of `card.json`."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"


def read_card(path: str | Path) -> Card:
    """Reads `card.json` of a packed data set; DataError when there is none, or one of another format."""
    files, folder = _filesystem(str(path))
    try:
        with files.open_input_stream(f"{folder}/{CARD}") as stream:
            card = TypeAdapter(Card).validate_json(stream.read())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(
            f"data.path={path}: no packed data set there; make one with `meamtm pack SOURCE {path}`"
        ) from error
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"data.path={path}: {CARD} cannot be read ({reason}); pack the data set again") from error
    if card.format != FORMAT:
        raise DataError(
            f"data.path={path}: format {card.format} is not {FORMAT}, which this version reads; pack it again"
        )
    return card


def digest_of(path: str | Path) -> str | None:
    """Gives the digest of the packed data set at a path; None where there is none, or none that can be read here."""
    try:
        return read_card(path).digest
    except DataError:
        return None


def count_labels(path: str | Path) -> int:
    """Counts the classes of the packed data set at a path; ten where there is none, or none that can be read here."""
    try:
        return len(read_card(path).classes)
    except DataError:
        return 10


class Packed:
    """The shards of a data set; row groups are numbered through all of them."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.card = read_card(path)
        self._files, self._folder = _filesystem(path)
        self._open = functools.lru_cache(maxsize=16)(self._open_shard)

    @functools.cached_property
    def _groups(self) -> list[tuple[str, int]]:
        return [(shard, group) for shard in self.card.shards for group in range(self._open(shard).num_row_groups)]

    @property
    def num_row_groups(self) -> int:
        """Row groups in all shards."""
        return len(self._groups)

    def table(self) -> pa.Table:
        """Every column but the sound itself, one row per clip, with its row group."""
        tables, lengths = [], []
        for shard in self.card.shards:
            file = self._open(shard)
            tables.append(self._read(shard, range(file.num_row_groups), set(file.schema_arrow.names) - {"audio"}))
            lengths += [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        row_groups = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)  # (clip,)
        return pa.concat_tables(tables).append_column("row_group", pa.array(row_groups)).combine_chunks()

    def sounds(self, row_group: int) -> list[bytes]:
        """The encoded sounds of one row group."""
        shard, group = self._groups[row_group]
        audio = self._read(shard, [group], {"audio"}).column("audio").combine_chunks()
        return audio.field("bytes").to_pylist()

    def decode(self, sample_rate_hz: int, clip_id: str, encoded: bytes) -> Int16[np.ndarray, " time"]:
        """Gives the waveform of a clip's encoded sound at another rate; DataError names a clip that is damaged."""
        try:
            return read_audio(encoded, sample_rate_hz)[0]
        except DataError as error:
            raise DataError(
                f"data.path={self.path}: clip {clip_id} is damaged ({error}); pack the data set again"
            ) from error

    def _read(self, shard: str, row_groups: Sequence[int], columns: set[str]) -> pa.Table:
        try:
            return self._open(shard).read_row_groups(row_groups, columns=list(columns), use_threads=False)
        except (OSError, pa.ArrowException) as error:
            raise self._damaged(shard, error) from error

    def _open_shard(self, shard: str) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(self._files.open_input_file(f"{self._folder}/{shard}"))
        except (OSError, pa.ArrowException) as error:
            raise self._damaged(shard, error) from error

    def _damaged(self, shard: str, error: Exception) -> DataError:
        reason = str(error).splitlines()[0]
        return DataError(f"data.path={self.path}: {shard} is missing or damaged ({reason}); pack the data set again")


def _filesystem(path: str) -> tuple[pyarrow.fs.FileSystem, str]:
    if not is_uri(path):
        return pyarrow.fs.LocalFileSystem(), str(Path(path).expanduser().absolute())
    try:
        files, folder = pyarrow.fs.FileSystem.from_uri(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"data.path={path}: not a place that pyarrow can read ({error}); correct the URI") from error
    return files, folder.rstrip("/")
