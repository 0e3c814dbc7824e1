"""What a command shows while it works, what it hears, and how it ends: progress bars, Ctrl-C and SIGTERM."""

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TaskID

from meamtm.errors import MeamtmError, remedy

if TYPE_CHECKING:
    from meamtm.config import RunConfig
    from meamtm.tracking import Listener, Metrics


LOSSES = ("pretrain/loss", "train/loss")


def run_commands(app: typer.Typer, program: str, words: Sequence[str] | None = None) -> None:
    """Runs what the command line says: 0 done, 2 the user's mistake in one line, 1 anything else."""
    # Threads that spin long while they wait take the core from those that work, and those that do not spin at all
    # wake late for each small operation (docs/results.md). OpenMP reads this when torch is loaded, which is later.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        return app(words, prog_name=program)
    except MeamtmError as error:
        said = str(error)
    except OSError as error:
        if (todo := remedy(error)) is None:
            raise
        said = f"{error.filename or 'a file'}: {error.strerror}; {todo}"
    except RuntimeError as error:
        if "home directory" not in str(error):
            raise
        said = "a path begins with ~, and nobody knows this user's home; set HOME, or write it out (data.cache_dir=...)"
    typer.echo(f"{program.rpartition(' ')[2]}: {said}", err=True)
    sys.exit(2)


@contextmanager
def counting(what: str) -> Iterator[Callable[[int, int], None]]:
    """Shows a bar and gives the function that moves it: (done, total)."""
    with bar() as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def steps() -> Iterator[Callable[[str, int, int | None], None]]:
    """Shows a bar for one step after the other and gives the function that moves it: (what, done, total or None)."""
    with bar() as progress:
        task = progress.add_task("", total=None)
        yield lambda what, done, total: progress.update(task, description=what, completed=done, total=total)


def epoch_bar(progress: Progress, num_epochs: int, name: str = "training") -> "Listener":
    """A sink that moves a bar of its own or, where nobody watches one, writes a line per epoch."""
    from meamtm.tracking import Listener

    task = progress.add_task(name, total=num_epochs)

    def show(metrics: "Metrics", step: int) -> None:
        keys = [key for key in (*LOSSES, "valid/accuracy", "valid/map") if key in metrics]
        shown = "  ".join(f"{key} {metrics[key]:.3f}" for key in keys)
        progress.update(task, completed=step, description=shown or None)
        if progress.disable and shown:
            typer.echo(f"epoch {step}  {shown}", err=True)

    return Listener(show)


def run_bars(progress: Progress, runs: "Mapping[str, RunConfig]") -> "Callable[[int, Metrics, int], None]":
    """A bar over all epochs of several runs and one for each run that is on its way, or a line per tenth of a run."""
    lengths = [(name, run.num_epochs) for name, run in runs.items()]
    total = progress.add_task(f"{len(runs)} runs", total=sum(num_epochs for _, num_epochs in lengths))
    tasks: dict[int, TaskID] = {}
    done = dict.fromkeys(range(len(runs)), 0)

    def show(number: int, metrics: "Metrics", step: int) -> None:
        name, num_epochs = lengths[number]
        if number not in tasks:
            tasks[number] = progress.add_task(name, total=num_epochs)
        done[number] = step
        progress.update(tasks[number], completed=step, visible=step < num_epochs)
        progress.update(total, completed=sum(done.values()))
        if progress.disable and (step == num_epochs or step % max(1, num_epochs // 10) == 0):
            typer.echo(f"{name}: epoch {step}/{num_epochs}  {loss(metrics)}", err=True)

    return show


def loss(metrics: "Metrics") -> str:
    """Gives an epoch's loss, with its name."""
    return next(f"{key} {metrics[key]:.3f}" for key in LOSSES if key in metrics)


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


def numbers(option: str, text: str) -> list[int]:
    """Reads an option's whole numbers, written as 1,2; raises MeamtmError for other text."""
    try:
        return [int(word) for word in text.split(",") if word.strip()]
    except ValueError as error:
        raise MeamtmError(f"{option}={text}: not whole numbers; write them as 1,2") from error


def end_at_once(main: Callable[[], None]) -> None:
    """Runs a program, and has its process end as soon as all that is registered for its end is done.

    Python would go on to take modules and their objects apart, which takes 2 s on a slow core for the half million that
    torch, Ray and MLflow leave, and in which threads of Ray's that a signal has surprised crash now and then.
    """
    code = 1

    def end() -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # who read it may be gone
                stream.flush()
        os._exit(code)

    atexit.register(end)  # before whatever main registers, which so comes first
    try:
        main()
        code = 0
    except SystemExit as wanted:
        code = wanted.code if isinstance(wanted.code, int) else int(wanted.code is not None)
        raise
