"""`python -m tune STUDY.yaml [KEY=VALUE ...]` and `python -m tune report STUDY.yaml`: the study on the command line."""

import logging
import os
import sys
from typing import Annotated

import typer
from rich.console import Console

from meamtm.errors import ConfigError, MeamtmError
from meamtm.screen import leave_quickly

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="`python -m tune STUDY.yaml` searches, or continues; `python -m tune report STUDY.yaml` shows what was found.",
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
    """Runs the command: 0 done, 2 the user's mistake in one line, 1 anything else."""
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as in meamtm.cli.main
    leave_quickly()
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    words = sys.argv[1:]
    if words and words[0] not in ("report", "--help"):
        words = ["run", *words]  # the study file may come first
    try:
        app(words, prog_name="python -m tune")
    except MeamtmError as error:
        typer.echo(f"tune: {error}", err=True)
        sys.exit(2)


@app.command()
def run(
    study: Study,
    changes: Changes = None,
    resume: Annotated[bool, typer.Option("--resume", help="require that there is something to continue")] = False,
) -> None:
    """Search, train the best again on train + validation, test it once; the same command again continues."""
    from tune.plan import load_plan
    from tune.report import summary
    from tune.study import run_study

    plan = load_plan(study, changes or [])
    if resume and not (plan.folder / "optuna.db").exists():
        raise ConfigError(f"--resume: {plan.folder} holds no study to continue; leave --resume out to begin")
    try:
        result = run_study(plan, typer.echo)
    except KeyboardInterrupt as stop:  # typer would leave without a word
        typer.echo("tune: stopped; the same command continues", err=True)
        raise typer.Exit(1) from stop
    console.print(summary(result))


@app.command()
def report(study: Study, changes: Changes = None) -> None:
    """Print and draw what a study has found so far."""
    from tune.plan import load_plan
    from tune.report import report as make_report

    console.print(make_report(load_plan(study, changes or [])))


if __name__ == "__main__":
    main()
