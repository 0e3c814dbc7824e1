"""SOURCE, a folder of sounds -> the clips in it: where each lies, what it is called, what belongs together.

Three layouts are known: an ESC-50-style CSV beside `audio/`, a manifest CSV that the user names, and a folder with one
sub-folder per class. Nothing is decoded here."""

import hashlib
import logging
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from meamtm.data.lists import ESC_COLUMNS, MANIFEST_COLUMNS, fold, header, inside, integer, read_rows
from meamtm.errors import DataError
from meamtm.files import file_status

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
OTHER_AUDIO_SUFFIXES = (
    ".aac",
    ".aif",
    ".aifc",
    ".aiff",
    ".amr",
    ".au",
    ".caf",
    ".m4a",
    ".oga",
    ".opus",
    ".rf64",
    ".snd",
    ".w64",
    ".wave",
    ".webm",
    ".wma",
)
"""Of sounds that nobody promises to read: what cannot be decoded is listed with its reason, and not passed over."""
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
        if ESC_COLUMNS.issubset(header(path))
    ]
    if len(found) > 1:
        names = ", ".join(str(path.relative_to(source)) for path in found)
        raise DataError(
            f"SOURCE={source}: {len(found)} tables look like ESC-50's ({names}); keep one, or name one by --manifest"
        )
    return found[0] if found else None


def _looks_like_esc(manifest: Path) -> bool:
    columns = header(manifest)
    return ESC_COLUMNS.issubset(columns) and not MANIFEST_COLUMNS.issubset(columns)


def _from_esc(source: Path, table: Path) -> tuple[tuple[Entry, ...], tuple[str, ...]]:
    names: dict[int, str] = {}
    entries = []
    for line, row in read_rows(table, ESC_COLUMNS):
        target, category = integer(row, "target", table, line), _composed(row["category"])
        if names.setdefault(target, category) != category:
            raise DataError(
                f"{table} line {line}: target={target} is both {names[target]} and {category}; number classes apart"
            )
        name = inside(source / "audio", row["filename"], table, line)
        group = _composed(row.get("src_file", "")) or _esc_source(name)
        path = source / "audio" / name
        entries.append(Entry(_clip_id(name), path, (category,), group, fold(row, table, line)))
    classes = tuple(names[target] for target in sorted(names))
    if len(set(classes)) < len(classes):
        twice = Counter(classes).most_common(1)[0][0]
        raise DataError(f"{table}: category={twice} has several targets; give each class one number")
    return tuple(entries), classes


def _composed(name: str) -> str:
    """One spelling for names that look the same: macOS takes accents apart."""
    return unicodedata.normalize("NFC", name)


def _clip_id(path: Path) -> str:
    """A clip's name: its path below SOURCE without the suffix."""
    return path.as_posix().removesuffix(path.suffix)


def _esc_source(name: Path) -> str:
    """FOLD-SOURCE-TAKE-TARGET, as 1-100032-A-0, names its source recording; any other name is its own."""
    found = re.fullmatch(r"\d+-(\d+)-[A-Z]-\d+", name.stem)
    return found[1] if found else _clip_id(name)


def _from_manifest(source: Path, table: Path) -> tuple[tuple[Entry, ...], tuple[str, ...]]:
    entries = []
    for line, row in read_rows(table, MANIFEST_COLUMNS):
        labels = tuple(dict.fromkeys(_composed(word.strip()) for word in row["label"].split(";") if word.strip()))
        if not labels:
            raise DataError(f"{table} line {line}: label is empty; name at least one class")
        name = inside(source, row["path"], table, line)
        clip_id = _clip_id(name)
        its_fold = fold(row, table, line) if row.get("fold") else None
        split = row.get("split") or None
        if split not in (*SPLITS, None):
            raise DataError(f"{table} line {line}: split={split} is none of {', '.join(SPLITS)}; use one of them")
        group = _composed(row.get("group", "")) or clip_id
        entries.append(Entry(clip_id, source / name, labels, group, its_fold, split))
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
            entries.append(Entry(clip_id, path, (_composed(folder.name),), clip_id))
    suffixes = (*AUDIO_SUFFIXES, *OTHER_AUDIO_SUFFIXES)
    loose = [path for path in source.iterdir() if path.suffix.lower() in suffixes and not path.name.startswith("._")]
    if loose and entries:
        logger.warning(
            "%s: %d sounds lie beside the classes' folders and are left out, such as %s; move them into one",
            source,
            len(loose),
            min(loose).name,
        )
    for table in sorted(source.glob("*.csv")):
        if MANIFEST_COLUMNS.issubset(header(table)):
            logger.warning(
                "%s: lists clips and is not read, for each folder here is a class; name it by --manifest to use it",
                table,
            )
    if not entries:
        raise DataError(
            f"SOURCE={source}: no sounds found; expected an ESC-50-style CSV beside audio/, "
            f"one sub-folder of {' '.join(AUDIO_SUFFIXES)} files per class, or --manifest CSV"
        )
    return tuple(entries), _sorted_labels(entries)


def find_sounds(folder: Path) -> list[Path]:
    """Files below a folder whose names are those of sounds, in order, without originals beside their conversions."""
    paths = list(_below(folder))
    found = [path for path in paths if path.suffix.lower() in AUDIO_SUFFIXES]
    converted = {path.with_suffix("") for path in found}
    others = [path for path in paths if path.suffix.lower() in OTHER_AUDIO_SUFFIXES]
    return sorted([*found, *(path for path in others if path.with_suffix("") not in converted)])


def _below(folder: Path) -> Iterator[Path]:
    """What is in a folder and in those below it, through links too, each folder once; none of a hidden folder, where
    programs keep old versions, and no shadow that macOS lays beside a sound."""
    seen: set[tuple[int, int]] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        found = os.stat(place)  # noqa: PTH116 - os.walk gives strings
        if (found.st_dev, found.st_ino) in seen:
            folders.clear()
            continue
        seen.add((found.st_dev, found.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        yield from (Path(place) / name for name in (*folders, *names) if not name.startswith("._"))


def _sorted_labels(entries: Sequence[Entry]) -> tuple[str, ...]:
    return tuple(sorted({label for entry in entries for label in entry.labels}))


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
