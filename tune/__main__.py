"""`python -m tune STUDY.yaml [KEY=VALUE ...]` and `python -m tune report STUDY.yaml`: the study on the command line."""

import logging
import sys
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.logging import RichHandler

from meamtm.errors import MeamtmError

console = Console()
errors = Console(stderr=True)
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

Study = Annotated[str, typer.Argument(metavar="STUDY.yaml", help="the study, for example configs/tune/esc10.yaml")]
Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE ...]", help="change the study (trials=12) or its base run (train.epochs=5)"),
]


@app.command("run")
def run(
    study: Study,
    words: Words = None,
    resume: Annotated[bool, typer.Option(help="what happens anyway: a study always continues")] = True,
) -> None:
    """Search, retrain the best, test it once. The same command continues a study, or says that it is done."""
    del resume
    from tune.plan import load_plan

    plan = load_plan(study, words or [])
    from tune.report import summary
    from tune.study import run_study

    result = run_study(plan, lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True))
    console.print(summary(result))


@app.command("report")
def report(study: Study, words: Words = None) -> None:
    """Print and draw what a study has found so far."""
    from tune.plan import load_plan
    from tune.report import report as make_report

    console.print(make_report(load_plan(study, words or [])))


def main() -> NoReturn:
    """Runs the command; exits with 0 when done, 2 for what the user can put right, 1 for anything else."""
    handler = RichHandler(console=errors, show_time=False, show_path=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    words = sys.argv[1:]
    if words and words[0] not in ("run", "report", "--help"):
        words = ["run", *words]
    try:
        app(words, prog_name="python -m tune", standalone_mode=False)
    except MeamtmError as error:
        errors.print(f"error: {error}", highlight=False, markup=False, soft_wrap=True)
        sys.exit(2)
    except typer.Exit as error:
        sys.exit(error.exit_code)
    except typer.Abort:
        sys.exit(1)
    except KeyboardInterrupt:
        errors.print("stopped; the same command continues", highlight=False)
        sys.exit(1)
    sys.exit(0)


if __name__ == "__main__":
    main()
