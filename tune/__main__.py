"""`python -m tune [report | nested] STUDY.yaml [KEY=VALUE ...]`: the study on the command line."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console

from meamtm.errors import ConfigError
from meamtm.screen import end_at_once, run_commands

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="`python -m tune STUDY.yaml` searches, or continues; `python -m tune report STUDY.yaml` shows what was found; "
    "`python -m tune nested STUDY.yaml` tells what such a search is worth.",
)
console = Console(markup=False, highlight=False)  # values may hold [brackets]
Study = Annotated[str, typer.Argument(metavar="STUDY.yaml", help="for example configs/tune/esc10.yaml")]
Changes = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="changes of the study (trials=12) or of its base run (train.epochs=5)"
    ),
]


def main() -> None:
    """Runs the command."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    words = sys.argv[1:]
    if words and words[0] not in ("report", "nested", "--help"):
        words = ["run", *words]  # the study file may come first
    run_commands(app, "python -m tune", words)


@app.command()
def run(
    study: Study,
    changes: Changes = None,
    resume: Annotated[bool, typer.Option("--resume", help="require that there is something to continue")] = False,
) -> None:
    """Search, train the best again on train + validation, test it once; the same command again continues."""
    from tune.plan import load_plan
    from tune.study import run_study
    from tune.tables import summary

    plan = load_plan(study, changes or [])
    if resume and not (plan.folder / "optuna.db").exists():
        raise ConfigError(f"--resume: {plan.folder} holds no study to continue; leave --resume out to begin")
    with _told_to_stop():
        result = run_study(plan, typer.echo)
    console.print(summary(result))


@app.command()
def report(study: Study, changes: Changes = None) -> None:
    """Print and draw what a study has found so far."""
    from tune.plan import load_plan
    from tune.report import report as make_report

    console.print(make_report(load_plan(study, changes or [])))


@app.command()
def nested(
    study: Study,
    changes: Changes = None,
    seeds: Annotated[int, typer.Option(min=1, help="runs of each study's choice, with seeds from train.seed on")] = 1,
    folds: Annotated[str, typer.Option(help="folds to test, as 1,2; all by default")] = "",
) -> None:
    """Search anew for each fold, without it, and test there what was chosen; the same command again continues."""
    from meamtm.screen import bar, numbers, run_bars, stop_on_signal
    from meamtm.tables import print_crossval
    from tune.nested import choose_each, evaluate_nested, plan_nested

    planned = plan_nested(study, changes or [], numbers("--folds", folds))
    with _told_to_stop():
        results = choose_each(planned, typer.echo)
    runs = {f"fold {fold}, seed {seed}": run for (fold, seed), run in planned.runs(results, seeds).items()}
    with stop_on_signal() as should_stop, bar() as progress:
        heard = run_bars(progress, runs)
        result = evaluate_nested(planned, results, seeds, heard, should_stop)
    print_crossval(result)


@contextmanager
def _told_to_stop() -> Iterator[None]:
    """Says how to go on; typer would leave without a word."""
    try:
        yield
    except KeyboardInterrupt as stop:
        typer.echo("tune: stopped; the same command continues", err=True)
        raise typer.Exit(1) from stop


if __name__ == "__main__":
    end_at_once(main)
