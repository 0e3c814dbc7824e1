"""A packed data set -> `Clips`: decoded once per node into a cache that every process on it shares, or streamed.

The cache is a folder `<digest>-<rate>` of two Arrow IPC files, `waveforms.arrow` (int16) and `clips.arrow` (the rest).
Both are memory-mapped, so that they lie in memory once, however many processes train."""

import json
import logging
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
from filelock import FileLock, Timeout
from jaxtyping import Int16, Int64

from meamtm.config import DataConfig
from meamtm.data.audio import num_cores, resampled_length
from meamtm.data.clips import Clips, MappedWaveforms, Waveforms
from meamtm.data.packed import Packed
from meamtm.data.stream import StreamedWaveforms
from meamtm.errors import DataError
from meamtm.files import whole_folder

FORMAT = 1
WAVEFORMS = "waveforms.arrow"
TABLE = "clips.arrow"
BATCH_BYTES = 64 << 20

logger = logging.getLogger(__name__)


def open_clips(data: DataConfig, sample_rate_hz: int) -> Clips:
    """Opens a packed data set at a sample rate, building the node's cache when it is not there.

    DataError when the data set is missing or damaged, or when there is no room for the cache.
    """
    packed = Packed(data.path)
    if data.cache == "none":
        return _stream(packed, sample_rate_hz)
    root = Path(data.cache_dir).expanduser().absolute()
    folder = root / f"{packed.card.digest}-{sample_rate_hz}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        clips = _open(folder, packed, sample_rate_hz)
        if clips is None:
            with _only_builder(folder):
                clips = _open(folder, packed, sample_rate_hz) or _build(folder, packed, sample_rate_hz)
    except OSError as error:
        raise DataError(
            f"data.cache_dir={data.cache_dir}: cannot be used ({error}); name a writable folder, or set data.cache=none"
        ) from error
    return clips


def _stream(packed: Packed, sample_rate_hz: int) -> Clips:
    table = packed_facts(packed, sample_rate_hz)
    return _clips(packed, table, StreamedWaveforms(packed, table, sample_rate_hz), sample_rate_hz)


def packed_facts(packed: Packed, sample_rate_hz: int) -> pa.Table:
    """The packed table with lengths at the new rate and multi-hot targets."""
    table, num_classes = packed.table(), len(packed.card.classes)
    labels = table.column("labels" if packed.card.multi_label else "label").combine_chunks()
    if packed.card.multi_label:
        rows = np.repeat(np.arange(len(table)), np.diff(labels.offsets.to_numpy()))
        columns = labels.flatten().to_numpy()
    else:
        rows, columns = np.arange(len(table)), labels.to_numpy()
    targets = np.zeros((len(table), num_classes), np.float32)  # (clip, label)
    targets[rows, columns] = 1
    native = zip(table.column("num_samples").to_pylist(), table.column("sampling_rate").to_pylist(), strict=True)
    lengths = [resampled_length(num_samples, rate_hz, sample_rate_hz) for num_samples, rate_hz in native]
    return pa.table(
        {
            "clip_id": table.column("clip_id"),
            "fold": table.column("fold"),
            "group": table.column("group"),
            "split": table.column("split"),
            "num_samples": pa.array(lengths, pa.int64()),
            "target": pa.FixedSizeListArray.from_arrays(pa.array(targets.ravel()), num_classes),
            "row_group": table.column("row_group"),
        }
    ).combine_chunks()


def _open(folder: Path, packed: Packed, sample_rate_hz: int) -> Clips | None:
    """Maps a complete cache; None when there is none, or when it is damaged and must be built again."""
    if not folder.is_dir():
        return None
    try:
        table = _map_table(folder / TABLE)
        about = json.loads(table.schema.metadata[b"meamtm"])
        size_bytes = (folder / WAVEFORMS).stat().st_size
        if about != _about(size_bytes) or len(table) != packed.card.num_clips:
            raise ValueError(f"{WAVEFORMS} has {size_bytes} bytes and {TABLE} says {about}")
    except (OSError, pa.ArrowException, ValueError, KeyError, TypeError) as error:
        logger.warning("the cache %s is damaged or of another version and is built again: %s", folder, error)
        return None
    starts, num_samples = (table.column(name).to_numpy() for name in ("start", "num_samples"))
    waveforms = MappedWaveforms(folder / WAVEFORMS, starts, num_samples)
    return _clips(packed, table, waveforms, sample_rate_hz)


def _clips(packed: Packed, table: pa.Table, waveforms: Waveforms, sample_rate_hz: int) -> Clips:
    card = packed.card
    return Clips(table, waveforms, card.classes, card.multi_label, card.digest, sample_rate_hz)


def _map_table(path: Path) -> pa.Table:
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).read_all()


def _about(size_bytes: int) -> dict[str, int]:
    return {"format": FORMAT, "waveforms_bytes": size_bytes}


@contextmanager
def _only_builder(folder: Path) -> Iterator[None]:
    """One process of the node builds; the others wait for it."""
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("waiting for another process that decodes sounds into %s", folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _build(folder: Path, packed: Packed, sample_rate_hz: int) -> Clips:
    """Decodes everything once."""
    facts = packed_facts(packed, sample_rate_hz)
    needed_bytes = 2 * int(facts.column("num_samples").to_numpy().sum())
    free_bytes = shutil.disk_usage(folder.parent).free
    if needed_bytes > free_bytes:
        raise DataError(
            f"data.cache_dir={folder.parent}: {needed_bytes / 1e9:.1f} GB of waveforms do not fit into the "
            f"{free_bytes / 1e9:.1f} GB left there; name a larger disk, or set data.cache=none"
        )
    logger.info("decoding %d clips into %s (%.1f GB)", len(facts), folder, needed_bytes / 1e9)
    with whole_folder(folder) as scratch:
        starts = _write_waveforms(scratch / WAVEFORMS, packed, facts, sample_rate_hz)
        about = json.dumps(_about((scratch / WAVEFORMS).stat().st_size))
        table = facts.append_column("start", pa.array(starts)).replace_schema_metadata({"meamtm": about})
        with pa.ipc.new_file(str(scratch / TABLE), table.schema) as writer:
            writer.write_table(table)
    clips = _open(folder, packed, sample_rate_hz)
    assert clips is not None, f"{folder} was just written"
    return clips


def _write_waveforms(path: Path, packed: Packed, facts: pa.Table, sample_rate_hz: int) -> Int64[np.ndarray, " clip"]:
    """Writes all waveforms as lists of int16 and returns where each starts, in samples from the file's beginning."""
    schema = pa.schema([pa.field("waveform", pa.list_(pa.field("item", pa.int16(), nullable=False)), nullable=False)])
    names = iter(facts.column("clip_id").to_pylist())
    with ThreadPoolExecutor(num_cores()) as pool, pa.ipc.new_file(str(path), schema) as writer:
        for row_group in range(packed.num_row_groups):
            decode = partial(packed.decode, sample_rate_hz)
            sounds = packed.sounds(row_group)
            for waveforms in _batches(pool.map(decode, islice(names, len(sounds)), sounds)):
                offsets = np.cumsum([0, *map(len, waveforms)], dtype=np.int32)
                column = pa.ListArray.from_arrays(offsets, np.concatenate(waveforms), type=schema.field(0).type)
                writer.write_batch(pa.record_batch([column], schema=schema))
    return _positions(path)


def _batches(waveforms: Iterable[Int16[np.ndarray, " time"]]) -> Iterator[list[Int16[np.ndarray, " time"]]]:
    """Gathers waveforms until they are worth a record batch."""
    batch: list[Int16[np.ndarray, " time"]] = []
    for waveform in waveforms:
        batch.append(waveform)
        if sum(each.nbytes for each in batch) >= BATCH_BYTES:
            yield batch
            batch = []
    if batch:
        yield batch


def _positions(path: Path) -> Int64[np.ndarray, " clip"]:
    """Where in the file each waveform's first sample lies, counted in samples."""
    with pa.memory_map(str(path)) as file:
        base = file.read_buffer(file.size()).address
        reader = pa.ipc.open_file(file)
        starts = []
        for number in range(reader.num_record_batches):
            column = reader.get_batch(number).column(0)
            first_byte = column.values.buffers()[1].address - base
            starts.append(first_byte // 2 + column.offsets.to_numpy()[:-1].astype(np.int64))
    return np.concatenate(starts)
