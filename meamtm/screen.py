"""What a command shows while it works, and what it hears: progress bars, Ctrl-C and SIGTERM."""

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress


@contextmanager
def counting(what: str) -> Iterator[Callable[[int, int], None]]:
    """Shows a bar and gives the function that moves it: (done, total)."""
    with bar() as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


class EpochBar:
    """A sink that moves a progress bar or, where nobody watches one, writes a line per epoch."""

    def __init__(self, progress: Progress, num_epochs: int) -> None:
        self._progress, self._task = progress, progress.add_task("training", total=num_epochs)

    def start(self, params: Mapping[str, Any], tags: Mapping[str, str], from_step: int = 0) -> None:
        """Has nothing to prepare."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Shows the newest figures."""
        keys = [key for key in ("train/loss", "valid/accuracy", "valid/map") if key in metrics]
        shown = "  ".join(f"{key} {metrics[key]:.3f}" for key in keys)
        self._progress.update(self._task, completed=step, description=shown or None)
        if self._progress.disable and shown:
            typer.echo(f"epoch {step}  {shown}", err=True)

    def artifact(self, path: Path, folder: str = "") -> None:
        """Shows no files."""

    def close(self, status: str = "FINISHED") -> None:
        """Ends with its bar."""


def bar() -> Progress:
    """Makes a bar that leaves nothing behind, so that an error is the only line on the screen and in a log."""
    screen = Console(stderr=True)
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    return Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal)


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C or SIGTERM into a wish to stop, granted after the step; a second one kills."""
    asked = threading.Event()

    def ask(number: int, _frame: object) -> None:
        asked.set()
        signal.signal(number, signal.default_int_handler)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    except KeyboardInterrupt as stop:  # typer would leave without a word
        typer.echo(f"meamtm: {str(stop) or 'stopped at once'}", err=True)
        raise typer.Exit(1) from stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
