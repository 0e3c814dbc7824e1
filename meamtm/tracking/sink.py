"""Metrics of a step -> one line of JSON, or several sinks at once.

A sink never stops training. The file is the truth about a run; a server shows it. What a crash left torn, or what a
resumed run will measure again, is dropped when the file is opened, so that the file of a resumed run holds the same
steps as the file of a run that was never interrupted."""

import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, TextIO, runtime_checkable

from meamtm.files import whole_file

logger = logging.getLogger(__name__)

Metrics = Mapping[str, float | int]
Status = Literal["FINISHED", "FAILED", "KILLED"]


@runtime_checkable
class Sink(Protocol):
    """Where a run's measurements go."""

    def start(self, params: Mapping[str, Any], tags: Mapping[str, str], from_step: int = 0) -> None:
        """Begins the record, or continues it after `from_step` finished steps; later ones will be measured again."""
        ...

    def log(self, metrics: Metrics, step: int) -> None:
        """Records what was measured at a step (1-based), without waiting for a network."""
        ...

    def artifact(self, path: Path, folder: str = "") -> None:
        """Keeps a copy of a file under the folder; the file may be deleted afterwards."""
        ...

    def close(self, status: Status = "FINISHED") -> None:
        """Ends the record with its true state; a second call does nothing."""
        ...


class Listener:
    """A sink that keeps nothing, and passes each epoch's metrics on: to a progress bar, or to lines of text."""

    def __init__(self, heard: Callable[[Metrics, int], None]) -> None:
        self._heard = heard

    def start(self, params: Mapping[str, Any], tags: Mapping[str, str], from_step: int = 0) -> None:
        """Has nothing to prepare."""

    def log(self, metrics: Metrics, step: int) -> None:
        """Passes on what was measured at a step."""
        self._heard(metrics, step)

    def artifact(self, path: Path, folder: str = "") -> None:
        """Keeps no files."""

    def close(self, status: Status = "FINISHED") -> None:
        """Ends nothing."""


class Sinks:
    """Several sinks as one; leaving its `with` block ends the record truthfully."""

    def __init__(self, *sinks: Sink) -> None:
        self.sinks = sinks

    def start(self, params: Mapping[str, Any], tags: Mapping[str, str], from_step: int = 0) -> None:
        """Starts each in turn; the first that cannot start stops the run, and ends those before it."""
        try:
            for sink in self.sinks:
                sink.start(params, tags, from_step)
        except BaseException as error:
            self.close(outcome(type(error)))
            raise

    def log(self, metrics: Metrics, step: int) -> None:
        """Logs to each."""
        for sink in self.sinks:
            sink.log(metrics, step)

    def artifact(self, path: Path, folder: str = "") -> None:
        """Gives each a copy."""
        for sink in self.sinks:
            sink.artifact(path, folder)

    def close(self, status: Status = "FINISHED") -> None:
        """Closes each, whatever happens to another."""
        with ExitStack() as stack:
            for sink in self.sinks:
                stack.callback(sink.close, status)

    def __enter__(self) -> "Sinks":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(outcome(kind))


def outcome(kind: type[BaseException] | None) -> Status:
    """Says how a run ended that left its `with` block by this exception: KILLED by Ctrl-C or an exit, else FAILED."""
    if kind is None:
        return "FINISHED"
    return "KILLED" if issubclass(kind, KeyboardInterrupt | SystemExit | GeneratorExit) else "FAILED"


class JsonLines:
    """One JSON object per log call: `{"step": 3, "time": 1789000000.0, "valid/accuracy": 0.91}`; time in Unix seconds.

    JSON knows no NaN and no infinity: both are written as null and read back as NaN."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: TextIO | None = None

    def start(self, params: Mapping[str, Any], tags: Mapping[str, str], from_step: int = 0) -> None:
        """Keeps the whole lines of steps up to `from_step` (0: none) and appends from there."""
        del params, tags  # the run's config.yaml holds them
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_rows(self.path, [row for row in read_rows(self.path) if from_step > 0 and row["step"] <= from_step])
        self._file = self.path.open("a", encoding="utf-8")

    def log(self, metrics: Metrics, step: int) -> None:
        """Appends a line and hands it to the operating system at once, so that a crash loses nothing."""
        assert self._file is not None, "start comes before log"
        self._file.write(_line(_now(metrics, step)))
        self._file.flush()

    def artifact(self, path: Path, folder: str = "") -> None:
        """Copies the file beside the lines, unless it lies there already."""
        target = self.path.parent / folder / path.name
        if target.exists() and target.samefile(path):
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)

    def close(self, status: Status = "FINISHED") -> None:
        """Closes the file; the lines say nothing of the status."""
        del status
        if self._file is not None:
            self._file.close()
            self._file = None


def read_rows(path: Path) -> list[dict[str, float | int]]:
    """Reads the lines of a metrics file, also of one still being written; a missing file has none, null is NaN."""
    return [{key: math.nan if value is None else value for key, value in line.items()} for line in _whole_lines(path)]


def write_rows(path: Path, rows: Iterable[Metrics]) -> None:
    """Writes a metrics file, whole or not at all, of rows as `read_rows` gives them."""
    with whole_file(path) as scratch:
        scratch.write_text("".join(_line(row) for row in rows), encoding="utf-8")


def append_row(path: Path, metrics: Metrics, step: int) -> None:
    """Adds a line to a metrics file that nobody keeps open; it is written at once, and whole."""
    with path.open("a", encoding="utf-8") as file:
        file.write(_line(_now(metrics, step)))


def _now(metrics: Metrics, step: int) -> dict[str, float | int]:
    return {"step": step, "time": round(time.time(), 3), **metrics}


def _line(row: Metrics) -> str:
    return json.dumps({key: value if math.isfinite(value) else None for key, value in row.items()}) + "\n"


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """Gives the lines that were written to their end; the last may be on its way, or its process died over it."""
    if not path.exists():
        return []
    lines: list[dict[str, Any]] = []
    *whole, _ = path.read_bytes().split(b"\n")
    for number, text in enumerate(whole, start=1):
        try:
            lines.append(dict(json.loads(text)))
        except (ValueError, TypeError):
            logger.warning("%s: line %d is damaged and is left out", path, number)
    return lines
