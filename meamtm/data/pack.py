"""A folder of sounds -> Parquet shards, `card.json` and `rejected.csv`; docs/data-format.md describes them.

Sounds are decoded, averaged to one channel and kept as FLAC at their own rate. A file that cannot be used is listed
with its reason and is not fatal. The data set appears whole or not at all."""

import csv
import logging
import re
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from meamtm.data.audio import num_cores, to_flac
from meamtm.data.folds import assign_folds
from meamtm.data.packed import CARD, Card, read_card
from meamtm.data.shards import Shards, Sound
from meamtm.data.sources import Entry, Source, find_clips
from meamtm.errors import DataError
from meamtm.files import file_status, whole_folder

__all__ = ["Card", "pack", "read_card"]

REJECTED = "rejected.csv"
AHEAD_BYTES = 128 << 20
"""Of files that are read before their turn: enough for all cores, and not several hours of sound at once."""
SHARD_NAME = re.compile(r"clips-\d{5,}\.parquet")

logger = logging.getLogger(__name__)


def pack(
    source: Path,
    out: Path,
    manifest: Path | None = None,
    *,
    strict: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Card:
    """Packs a folder of sounds; an unchanged source that is packed already is recognised and left alone.

    With `strict`, a file that cannot be used is a DataError. So is an `out` that holds anything but a data set.
    """
    source, out = source.expanduser(), out.expanduser()  # of a job no shell has done that
    manifest = manifest.expanduser() if manifest is not None else None
    found = find_clips(source, manifest)
    _check_out(out)
    card = _already(out, found.fingerprint)
    if card is None:
        try:
            with whole_folder(out) as folder:
                card = _write(found, folder, strict, progress)
        except OSError as error:
            reason = error.strerror or str(error).splitlines()[0]
            raise DataError(
                f"OUT={out}: cannot be written ({reason}); make room there, or name another folder"
            ) from error
    elif card.num_rejected and strict:
        raise DataError(
            f"{out / REJECTED}: lists {card.num_rejected} unusable files; correct them, or pack without --strict"
        )
    for warning in card.warnings:
        logger.warning("%s", warning)
    return card


def _check_out(out: Path) -> None:
    """Refuses an OUT that holds anything that packing did not write: it would be lost."""
    if not out.exists():
        return
    if not out.is_dir():
        raise DataError(f"OUT={out}: exists and is a file; name a folder")
    names = sorted(path.name for path in out.iterdir())
    foreign = [name for name in names if name not in (CARD, REJECTED) and not SHARD_NAME.fullmatch(name)]
    if foreign or (names and CARD not in names):
        raise DataError(
            f"OUT={out}: exists and is not a packed data set (holds {(foreign or names)[0]}); name another folder"
        )


def _already(out: Path, fingerprint: str) -> Card | None:
    """The card of a complete data set made from this very source, if there is one."""
    if not (out / CARD).is_file():
        return None
    try:
        card = read_card(out)
        num_clips = sum(pq.read_metadata(out / shard).num_rows for shard in card.shards)
    except (DataError, OSError, pa.ArrowException) as error:
        logger.warning("%s is damaged and is packed again: %s", out, error)
        return None
    if card.source != fingerprint or card.num_clips != num_clips:
        logger.info("%s was packed from other files and is packed again", out)
        return None
    return card


def _write(source: Source, folder: Path, strict: bool, progress: Callable[[int, int], None] | None) -> Card:
    """Writes every file of a data set.

    A file that cannot be used decides nothing: where folds would be others without it, or no clip would have several
    labels, all is written once more."""
    rejected: list[Sound] = []
    # Folds that were dealt to clips with a split of their own decide nothing.
    has_split = any(entry.split for entry in source.entries)
    while True:
        kept, refused, shards, digest = _write_shards(source, folder, strict, progress)
        rejected += refused
        _check_enough(kept, rejected)
        if not refused:
            break
        usable = _without(source, refused)
        deals_the_same = has_split or assign_folds(usable.entries) == [sound.entry for sound in kept]
        if deals_the_same and usable.multi_label == source.multi_label:
            break
        for shard in shards:
            (folder / shard).unlink()
        source = usable
    named = source.entries if has_split else [sound.entry for sound in kept]
    card = Card(
        classes=source.classes,
        multi_label=source.multi_label,
        num_clips=len(kept),
        num_rejected=len(rejected),
        folds=tuple(sorted({entry.fold for entry in named if entry.fold is not None})),
        rates_hz=tuple(sorted({sound.sample_rate_hz for sound in kept})),
        total_s=round(sum(sound.num_samples / sound.sample_rate_hz for sound in kept), 3),
        digest=digest,
        shards=tuple(shards),
        source=source.fingerprint,
        num_groups=len({sound.entry.group for sound in kept}),
        has_split=has_split,
        warnings=(*_empty_classes(source, kept), *_copies(kept, "split" if has_split else "fold")),
    )
    _write_rejected(folder / REJECTED, rejected)
    (folder / CARD).write_text(card.to_json(), encoding="utf-8")
    return card


def _write_shards(
    source: Source, folder: Path, strict: bool, progress: Callable[[int, int], None] | None
) -> tuple[list[Sound], list[Sound], list[str], str]:
    """Writes the sounds; gives the facts of those that were kept, those that were not, the shards and their digest."""
    entries = assign_folds(source.entries)
    kept: list[Sound] = []
    rejected: list[Sound] = []
    shards = Shards(folder, source)
    try:
        for done, sound in enumerate(_read_sounds(entries), start=1):
            if sound.reason and strict:
                raise DataError(f"{sound.entry.path}: {sound.reason}; correct or remove it, or pack without --strict")
            if sound.reason:
                rejected.append(sound)
            else:
                shards.add(sound)
                kept.append(sound.without_flac())
            if progress:
                progress(done, len(entries))
        return kept, rejected, shards.names, shards.finish()
    finally:
        shards.close()


def _without(source: Source, refused: Sequence[Sound]) -> Source:
    """What a source holds beside some files."""
    unusable = {sound.entry.clip_id for sound in refused}
    entries = tuple(entry for entry in source.entries if entry.clip_id not in unusable)
    return replace(source, entries=entries, multi_label=any(len(entry.labels) > 1 for entry in entries))


def _read_sounds(entries: Sequence[Entry]) -> Iterator[Sound]:
    """Reads on all cores, in order, a bounded number of files and bytes ahead: memory does not grow with the set."""
    num_threads = num_cores()
    waiting: deque[tuple[int, Future[Sound]]] = deque()
    rest = deque(entries)
    ahead_bytes = 0
    with ThreadPoolExecutor(num_threads) as pool:
        try:
            while rest or waiting:
                while rest and len(waiting) < 4 * num_threads and (ahead_bytes < AHEAD_BYTES or not waiting):
                    entry = rest.popleft()
                    size_bytes = _size_bytes(entry.path)
                    waiting.append((size_bytes, pool.submit(_read_sound, entry)))
                    ahead_bytes += size_bytes
                size_bytes, future = waiting.popleft()
                yield future.result()
                ahead_bytes -= size_bytes
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _size_bytes(path: Path) -> int:
    found = file_status(path)
    return found.st_size if found is not None else 0


def _read_sound(entry: Entry) -> Sound:
    try:
        entry.clip_id.encode()
        flac = to_flac(entry.path)
    except UnicodeEncodeError:
        return Sound(entry, reason="its name is not UTF-8; rename it")
    except DataError as error:
        return Sound(entry, reason=str(error))
    if flac.is_silent:
        return Sound(entry, reason="silent: every sample is zero, as 16 bits of one channel")
    return Sound(entry, flac.data, flac.sample_rate_hz, flac.num_samples, flac.digest)


def _check_enough(kept: Sequence[Sound], rejected: Sequence[Sound]) -> None:
    """At least two classes must have a usable clip."""
    counts = Counter(label for sound in kept for label in sound.entry.labels)
    if len(counts) < 2:
        first = f"; the first is {rejected[0].entry.path}: {rejected[0].reason}" if rejected else ""
        raise DataError(
            f"{len(rejected)} of {len(rejected) + len(kept)} files cannot be used, which leaves {len(counts)} classes "
            f"of at least two{first}; correct the files or their list"
        )


def _empty_classes(source: Source, kept: Sequence[Sound]) -> Iterator[str]:
    """Says so where a class has no usable clip."""
    there = {label for sound in kept for label in sound.entry.labels}
    if empty := [name for name in source.classes if name not in there]:
        yield f"no usable clip has the class {', '.join(empty)}; add one or leave the class out, or training refuses"


def _copies(kept: Sequence[Sound], part: Literal["fold", "split"]) -> Iterator[str]:
    """Says so where clips of the same samples lie apart, so that a test would hear what trained, or differ in label."""
    first: dict[str, Entry] = {}
    pairs = [(first.setdefault(sound.digest, sound.entry), sound.entry) for sound in kept]
    for column, apart, remedy in (
        (part, [pair for pair in pairs if getattr(pair[0], part) != getattr(pair[1], part)], "give both one group"),
        ("label", [pair for pair in pairs if set(pair[0].labels) != set(pair[1].labels)], "correct one label"),
    ):
        if apart:
            first_one, again = apart[0]
            yield (
                f"the same samples come again with another {column}: {again.clip_id} as {first_one.clip_id} "
                f"({len(apart)} such clips); remove one of the two, or {remedy} in a list (--manifest)"
            )


def _write_rejected(path: Path, rejected: Sequence[Sound]) -> None:
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("path", "reason"))
        writer.writerows((sound.entry.path, sound.reason) for sound in rejected)
