"""SOURCE, a folder of sounds -> the clips in it: where each lies, what it is called, what belongs together.

Three layouts are known: an ESC-50-style CSV beside `audio/`, a manifest CSV that the user names, and a folder with one
sub-folder per class. Nothing is decoded here."""

import csv
import hashlib
import logging
import os
import re
import stat
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from meamtm.errors import DataError

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
OTHER_AUDIO_SUFFIXES = (".aac", ".aif", ".aiff", ".amr", ".au", ".caf", ".m4a", ".oga", ".opus", ".webm", ".wma")
"""Of sounds that nobody promises to read: what cannot be decoded is listed with its reason, and not passed over."""
ESC_COLUMNS = {"filename", "fold", "target", "category"}
MANIFEST_COLUMNS = {"path", "label"}
SPLITS = ("train", "valid", "test")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Entry:
    """One clip before decoding."""

    clip_id: str
    path: Path
    labels: tuple[str, ...]
    group: str
    fold: int | None = None
    split: str | None = None


@dataclass(frozen=True)
class Source:
    """All clips of a folder, with class names in the order of their label numbers."""

    entries: tuple[Entry, ...]
    classes: tuple[str, ...]
    multi_label: bool
    fingerprint: str


def find_clips(source: Path, manifest: Path | None = None) -> Source:
    """Lists the clips of a folder; DataError when it has none or its lists contradict themselves."""
    if source.is_file():
        raise DataError(f"SOURCE={source}: is a file; name a folder with sounds in it, and unpack an archive first")
    if not source.is_dir():
        raise DataError(f"SOURCE={source}: no such folder; name a folder with sounds in it")
    table = manifest or _esc_table(source)
    if manifest and not _looks_like_esc(manifest):
        entries, classes = _from_manifest(source, manifest)
    elif table:
        entries, classes = _from_esc(source, table)
    else:
        entries, classes = _from_folders(source)
    if not entries:
        raise DataError(f"{table or source}: names no sound; expected at least one clip of each of two classes")
    if len(classes) < 2:
        raise DataError(
            f"{table or source}: all clips have one class ({', '.join(classes)}); label at least two classes"
        )
    for name in classes:
        if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name):
            raise DataError(f"{table or source}: the class {name!r} has a name that is no line of text; rename it")
    _check_unique(entries, table or source)
    _check_groups(entries, table or source)
    return Source(entries, classes, any(len(entry.labels) > 1 for entry in entries), _fingerprint(entries, table))


def _esc_table(source: Path) -> Path | None:
    """The CSV whose columns are ESC-50's, if there is one."""
    found = [
        path
        for folder in (source, source / "meta")
        for path in sorted(folder.glob("*.csv"))
        if _header(path) >= ESC_COLUMNS
    ]
    if len(found) > 1:
        names = ", ".join(str(path.relative_to(source)) for path in found)
        raise DataError(
            f"SOURCE={source}: {len(found)} tables look like ESC-50's ({names}); keep one, or name one by --manifest"
        )
    return found[0] if found else None


def _looks_like_esc(manifest: Path) -> bool:
    columns = _header(manifest) if manifest.is_file() else set()
    return columns >= ESC_COLUMNS and not columns >= MANIFEST_COLUMNS


def _from_esc(source: Path, table: Path) -> tuple[tuple[Entry, ...], tuple[str, ...]]:
    names: dict[int, str] = {}
    entries = []
    for line, row in _read_table(table, ESC_COLUMNS):
        target, category = _integer(row, "target", table, line), row["category"]
        if names.setdefault(target, category) != category:
            raise DataError(
                f"{table} line {line}: target={target} is both {names[target]} and {category}; number classes apart"
            )
        name = Path(row["filename"])
        clip_id = _clip_id(name)
        group = row.get("src_file") or _esc_source(name)
        path = _inside(source / "audio", name, table, line)
        entries.append(Entry(clip_id, path, (category,), group, _fold(row, table, line)))
    classes = tuple(names[target] for target in sorted(names))
    if len(set(classes)) < len(classes):
        twice = Counter(classes).most_common(1)[0][0]
        raise DataError(f"{table}: category={twice} has several targets; give each class one number")
    return tuple(entries), classes


def _clip_id(path: Path) -> str:
    """A clip's name: its path below SOURCE without the suffix."""
    return path.as_posix().removesuffix(path.suffix)


def _esc_source(name: Path) -> str:
    """FOLD-SOURCE-TAKE-TARGET, as 1-100032-A-0, names its source recording; any other name is its own."""
    found = re.fullmatch(r"\d+-(\d+)-[A-Z]-\d+", name.stem)
    return found[1] if found else _clip_id(name)


def _from_manifest(source: Path, table: Path) -> tuple[tuple[Entry, ...], tuple[str, ...]]:
    entries = []
    for line, row in _read_table(table, MANIFEST_COLUMNS):
        labels = tuple(dict.fromkeys(word.strip() for word in row["label"].split(";") if word.strip()))
        if not labels:
            raise DataError(f"{table} line {line}: label is empty; name at least one class")
        name = Path(row["path"])
        path = _inside(source, name, table, line)
        clip_id = _clip_id(name)
        fold = _fold(row, table, line) if row.get("fold") else None
        split = row.get("split") or None
        if split not in (*SPLITS, None):
            raise DataError(f"{table} line {line}: split={split} is none of {', '.join(SPLITS)}; use one of them")
        entries.append(Entry(clip_id, path, labels, row.get("group") or clip_id, fold, split))
    for column in ("fold", "split"):
        given = sum(getattr(entry, column) is not None for entry in entries)
        if given not in (0, len(entries)):
            raise DataError(
                f"{table}: {column} is empty for {len(entries) - given} of {len(entries)} clips; "
                "fill it in for all of them or for none"
            )
    return tuple(entries), _sorted_labels(entries)


def _from_folders(source: Path) -> tuple[tuple[Entry, ...], tuple[str, ...]]:
    entries = []
    for folder in sorted(
        path for path in source.iterdir() if path.is_dir() and not path.name.startswith((".", "__MACOSX"))
    ):
        files = find_sounds(folder)
        if not files:
            logger.warning("%s: holds no sound, so no class is called %s", folder, folder.name)
        for path in files:
            clip_id = _clip_id(path.relative_to(source))
            entries.append(Entry(clip_id, path, (folder.name,), clip_id))
    suffixes = (*AUDIO_SUFFIXES, *OTHER_AUDIO_SUFFIXES)
    loose = [path for path in source.iterdir() if path.suffix.lower() in suffixes and not path.name.startswith("._")]
    if loose and entries:
        logger.warning(
            "%s: %d sounds lie beside the classes' folders and are left out, such as %s; move them into one",
            source,
            len(loose),
            min(loose).name,
        )
    if not entries:
        raise DataError(
            f"SOURCE={source}: no sounds found; expected an ESC-50-style CSV beside audio/, "
            f"one sub-folder of {' '.join(AUDIO_SUFFIXES)} files per class, or --manifest CSV"
        )
    return tuple(entries), _sorted_labels(entries)


def find_sounds(folder: Path) -> list[Path]:
    """Files below a folder whose names are those of sounds, in order, without originals beside their conversions."""
    paths = [path for path in folder.rglob("*") if not path.name.startswith("._")]  # of macOS, beside each sound
    found = [path for path in paths if path.suffix.lower() in AUDIO_SUFFIXES]
    converted = {path.with_suffix("") for path in found}
    others = [path for path in paths if path.suffix.lower() in OTHER_AUDIO_SUFFIXES]
    return sorted([*found, *(path for path in others if path.with_suffix("") not in converted)])


def _sorted_labels(entries: Sequence[Entry]) -> tuple[str, ...]:
    return tuple(sorted({label for entry in entries for label in entry.labels}))


def _header(table: Path) -> set[str]:
    """Column names of a CSV, whatever its further lines are encoded in; none when it is not text."""
    try:
        with table.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            return set(next(csv.reader(file), []))
    except csv.Error:
        return set()


def _read_table(table: Path, needed: set[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yields the rows of a CSV with their line numbers."""
    if not table.is_file():
        raise DataError(
            f"--manifest={table}: no such file; name a CSV with the columns {','.join(sorted(needed))}, or leave it "
            "out where each class has a folder"
        )
    if missing := needed - (there := _header(table)):
        other = next((mark for mark in ";\t|" if any(mark in name for name in there)), None)
        hint = f" and has {','.join(map(ascii, sorted(there)))}; correct its first line"
        if other is not None:
            hint = f", separated by commas and not by {other!r}"
        raise DataError(
            f"{table}: has no column {', '.join(sorted(missing))}; it needs {','.join(sorted(needed))}{hint}"
        )
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            for row in reader:
                if empty := [column for column in sorted(needed) if not row[column]]:
                    raise DataError(f"{table} line {reader.line_num}: {empty[0]} is empty; fill it in")
                yield reader.line_num, row
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table}: cannot be read as a CSV in UTF-8 ({error}); save it as one") from error


def _integer(row: Mapping[str, str], column: str, table: Path, line: int) -> int:
    try:
        return int(row[column])
    except ValueError as error:
        raise DataError(f"{table} line {line}: {column}={row[column]} is not a whole number; write one") from error


def _fold(row: Mapping[str, str], table: Path, line: int) -> int:
    fold = _integer(row, "fold", table, line)
    if not 0 <= fold < 1 << 15:
        raise DataError(f"{table} line {line}: fold={fold} is not within 0 to 32767; number folds from 1")
    return fold


def _inside(folder: Path, name: Path, table: Path, line: int) -> Path:
    """A path below a folder; a list must not reach out of it."""
    if name.is_absolute() or ".." in name.parts:
        raise DataError(f"{table} line {line}: {name} lies outside {folder}; write paths relative to it")
    return folder / name


def _check_unique(entries: Sequence[Entry], where: Path) -> None:
    clip_id, times = Counter(entry.clip_id for entry in entries).most_common(1)[0]
    if times > 1:
        raise DataError(
            f"{where}: {times} clips are called {clip_id}; give each file a name of its own, suffix aside, and a file "
            "with several labels one line with all of them, separated by ;"
        )


def _check_groups(entries: Sequence[Entry], where: Path) -> None:
    """A group lies in one fold and one split, or the test would be heard in training."""
    for column in ("fold", "split"):
        places = defaultdict(set)
        for entry in entries:
            places[entry.group].add(getattr(entry, column))
        for group, found in places.items():
            if len(found) > 1:
                names = ", ".join(map(str, sorted(found)))
                raise DataError(
                    f"{where}: group={group} is in several {column}s ({names}); clips of one group share a {column}"
                )


def _fingerprint(entries: Sequence[Entry], table: Path | None) -> str:
    """Tells cheaply whether SOURCE changed: names, sizes and times of the files, and the text of the table."""
    state = hashlib.sha256(table.read_bytes() if table else b"")
    for entry in entries:
        found = file_status(entry.path)
        state.update(repr((entry.clip_id, entry.labels, found and (found.st_size, found.st_mtime_ns))).encode())
    return state.hexdigest()[:16]


def file_status(path: Path) -> os.stat_result | None:
    """Looks at a file; None where there is none, whatever its name is, or where there is something else."""
    try:
        found = path.stat()
    except (OSError, ValueError):  # a name too long, or with a zero in it
        return None
    return found if stat.S_ISREG(found.st_mode) else None
