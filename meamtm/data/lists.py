"""A CSV that lists clips -> its rows, and what their cells mean; what none of them can mean is a DataError."""

import csv
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from meamtm.errors import DataError
from meamtm.files import file_status

ESC_COLUMNS = {"filename", "fold", "target", "category"}
MANIFEST_COLUMNS = {"path", "label"}
KNOWN_COLUMNS = {*ESC_COLUMNS, *MANIFEST_COLUMNS, "group", "split", "src_file"}
PATHS = ("filename", "path")
"""Cells that are read as they stand: a file's name may end with a blank."""


def header(table: Path) -> list[str]:
    """Column names of a CSV, whatever its further lines are encoded in; none when it is not text, or no file."""
    if file_status(table) is None:
        return []
    try:
        with table.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            return [name.strip() for name in next(csv.reader(file), [])]
    except csv.Error:
        return []


def read_rows(table: Path, needed: set[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yields the rows of a CSV with their line numbers, without blanks around their cells."""
    columns = _check_columns(table, needed)
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            next(reader)
            for cells in filter(None, reader):
                row = dict(zip(columns, cells, strict=False))
                row = {name: cell if name in PATHS else cell.strip() for name, cell in row.items()}
                if empty := [column for column in sorted(needed) if not row.get(column, "").strip()]:
                    raise DataError(f"{table} line {reader.line_num}: {empty[0]} is empty; fill it in")
                if any(cell.strip() for cell in cells[len(columns) :]):
                    raise DataError(
                        f"{table} line {reader.line_num}: has {len(cells)} cells, and the first line names "
                        f"{len(columns)}; separate several labels by ; and put a cell with a comma in quotes"
                    )
                yield reader.line_num, row
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table}: cannot be read as a CSV in UTF-8 ({error}); save it as one") from error


def _check_columns(table: Path, needed: set[str]) -> list[str]:
    if not table.is_file():
        raise DataError(
            f"--manifest={table}: no such file; name a CSV with the columns {','.join(sorted(needed))}, or leave it "
            "out where each class has a folder"
        )
    columns = header(table)
    if missing := needed - set(columns):
        other = next((mark for mark in ";\t|" if any(mark in name for name in columns)), None)
        hint = f" and has {','.join(map(ascii, sorted(columns)))}; correct its first line"
        if other is not None:
            hint = f", separated by commas and not by {other!r}"
        raise DataError(
            f"{table}: has no column {', '.join(sorted(missing))}; it needs {','.join(sorted(needed))}{hint}"
        )
    if twice := [name for name, times in Counter(columns).items() if times > 1 and name in KNOWN_COLUMNS]:
        raise DataError(f"{table}: has several columns {twice[0]}; keep one, with several labels separated by ;")
    return columns


def integer(row: Mapping[str, str], column: str, table: Path, line: int) -> int:
    """The whole number of a cell."""
    try:
        return int(row[column])
    except ValueError as error:
        raise DataError(f"{table} line {line}: {column}={row[column]} is not a whole number; write one") from error


def fold(row: Mapping[str, str], table: Path, line: int) -> int:
    """The fold of a row."""
    number = integer(row, "fold", table, line)
    if not 0 <= number < 1 << 15:
        raise DataError(f"{table} line {line}: fold={number} is not within 0 to 32767; number folds from 1")
    return number


def inside(folder: Path, text: str, table: Path, line: int) -> Path:
    """A cell's path as it is spelt below the folder: blanks around it may be the list's, and a Mac may have taken
    accents apart. A list must not reach out of the folder."""
    composed, apart = (unicodedata.normalize(form, text.strip()) for form in ("NFC", "NFD"))
    spellings = [Path(each) for each in (text, text.strip(), composed, apart)]
    name = next((each for each in spellings if file_status(folder / each)), spellings[1])
    if name.is_absolute() or ".." in name.parts:
        raise DataError(f"{table} line {line}: {name} lies outside {folder}; write paths relative to it")
    return name
