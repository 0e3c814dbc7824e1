"""Configs against each other, or a recipe against itself without one ingredient after the other (`--ablate`).

All are trained and tested on the same folds with the same seeds, as many runs at once as the machine has room for, and
as `meamtm crossval` does, whose runs are kept: the same command again continues, and more seeds add to what is there.
Prints a table, in points of the first row, and writes CSV, when it is stopped too, of what is complete. `won` and
`lost` count the clips that are named right more and less often than by the first row, and `p` is how probable it is
that equals differ as much (the sign test; with one seed McNemar's). From the repository root:

    python benchmarks/compare.py configs/esc10.yaml configs/notebook.yaml [--folds 1,2] [--seeds 3] [KEY=VALUE ...]
    python benchmarks/compare.py configs/esc10.yaml --ablate [mixing masks ...]
"""

import argparse
import csv
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table
from scipy.stats import binomtest

from meamtm.config import RunConfig, Value, flatten, load, override, parse_changes
from meamtm.crossval import CrossValidation, cross_validate, deviation, plan_runs
from meamtm.distributed import run_all
from meamtm.errors import MeamtmError
from meamtm.screen import bar, numbers, run_bars, stop_on_signal
from meamtm.tracking import read_rows
from meamtm.training.run import absolute, recall

WITHOUT: dict[str, dict[str, Value]] = {
    "mixing": {"mix.kind": "none"},
    "mixing-end": {"mix.until": 1.0},
    "recalibration": {"train.recalibrate": False},
    "shifts": {"augment.roll": 0.0},
    "speeds": {"augment.speed": 0.0},
    "gains": {"augment.gain_db": 0.0},
    "masks": {"augment.time_mask": 0.0, "augment.freq_mask": 0.0},
    "smoothing": {"loss.label_smoothing": 0.0},
    "averaging": {"train.ema_decay": 0.0},
    "muon": {"optim.name": "adamw", "optim.lr": 1e-3},
    "schedule": {"optim.schedule": "constant"},
    "warm-up": {"optim.warmup": 0.0},
    "decay": {"optim.weight_decay": 0.0},
    "clipping": {"optim.clip_grad": 0.0},
    "drop-path": {"encoder.drop_path": 0.0},
    "stem": {"encoder.stem": "patch"},
}
"""What takes each ingredient out of a recipe."""
ABSENT_WITH: dict[str, dict[str, Value]] = {
    "mixing-end": {"mix.kind": "none"},
    "recalibration": {"encoder.stem": "patch"},
}
"""Keys with which an ingredient is absent already: nothing is mixed, or there is no batch norm."""


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", metavar="CONFIG or KEY=VALUE", help="YAML files, and changes to all")
    parser.add_argument("--folds", default="", help="folds to test, as 1,2; all by default")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each fold")
    parser.add_argument("--ablate", nargs="*", choices=list(WITHOUT), help="the first config without each of these")
    parser.add_argument("--out", type=Path, default=Path("runs/compare.csv"), help="CSV to write")
    options = parser.parse_args()
    changes = parse_changes([word for word in options.words if "=" in word])
    variants = {path: load(path, changes) for path in options.words if "=" not in path}
    if options.ablate is not None:
        variants |= ablated(next(iter(variants.values())), options.ablate or list(WITHOUT))
    folds = numbers("--folds", options.folds)
    plans = {name: plan_runs(absolute(config), folds, options.seeds) for name, config in variants.items()}
    try:
        train(plans)
    finally:
        complete = {name: config for name, config in variants.items() if all(map(recall, plans[name].values()))}
        results = {
            name: cross_validate(config, folds=folds, num_seeds=options.seeds) for name, config in complete.items()
        }
        if results:
            show(results)
            write(results, options.out)


def ablated(recipe: RunConfig, names: list[str]) -> dict[str, RunConfig]:
    """Takes one ingredient after the other out of a recipe, of those that it has."""
    flat = flatten(recipe)
    absent = {name for name, keys in ABSENT_WITH.items() if keys.items() <= flat.items()}
    if recipe.optim.name != "muon":
        absent.add("muon")
    found = {f"without {name}": override(recipe, WITHOUT[name]) for name in names if name not in absent}
    return {name: config for name, config in found.items() if config != recipe}


def train(plans: Mapping[str, Mapping[tuple[int, int], RunConfig]]) -> None:
    """Trains and tests what is missing of the runs of each config, all side by side: five runs alone leave one of two
    cores idle at their end."""
    runs = {
        f"{name}: fold {fold}, seed {seed}": run for name, plan in plans.items() for (fold, seed), run in plan.items()
    }
    with stop_on_signal() as should_stop, bar() as progress:
        run_all(list(runs.values()), run_bars(progress, runs), should_stop)


def rows(results: dict[str, CrossValidation]) -> list[dict[str, str]]:
    """Gives each config's mean, its deviations, how far it lies from the first one, and what a run takes."""
    base = next(iter(results.values()))
    first = statistics.fmean(base.values())
    return [
        {
            "config": name,
            "mean %": f"{100 * statistics.fmean(result.values()):.2f}",
            "std of runs": _deviation(result.values()),
            "std of seeds": _deviation(result.seed_means()),
            "points": f"{100 * (statistics.fmean(result.values()) - first):+.2f}",
            **clip_by_clip(result, base),
            "runs": str(len(result.rows)),
            "min a run": f"{statistics.median(minutes(Path(row.run_folder)) for row in result.rows):.1f}",
        }
        for name, result in results.items()
    ]


def clip_by_clip(result: CrossValidation, base: CrossValidation) -> dict[str, str]:
    """Compares how many of the models name each clip right, of those that both have heard."""
    rights = {each.clip: each.num_right for each in base.predictions()}
    differences = [each.num_right - rights[each.clip] for each in result.predictions() if each.clip in rights]
    won, lost = (sum(sign * difference > 0 for difference in differences) for sign in (1, -1))
    if result is base or won + lost == 0:
        return {"won": "-", "lost": "-", "p": "-"}
    return {"won": str(won), "lost": str(lost), "p": f"{binomtest(won, won + lost).pvalue:.2g}"}


def _deviation(shares: Sequence[float]) -> str:
    return f"{100 * deviation(shares):.2f}" if len(shares) > 1 else "-"


def minutes(folder: Path) -> float:
    """Gives what a run's epochs take, the first one reckoned like the others; of a run never interrupted."""
    ends_s = [row["time"] for row in read_rows(folder / "metrics.jsonl") if "train/loss" in row]
    return (ends_s[-1] - ends_s[0]) / max(len(ends_s) - 1, 1) * len(ends_s) / 60


def show(results: dict[str, CrossValidation]) -> None:
    """Prints what is known so far."""
    found = rows(results)
    table = Table()
    for name in found[0]:
        table.add_column(name, overflow="fold")
    for row in found:
        table.add_row(*row.values())
    Console().print(table)


def write(results: dict[str, CrossValidation], out: Path) -> None:
    """Writes the table as CSV."""
    found = rows(results)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(found[0]))
        writer.writeheader()
        writer.writerows(found)


if __name__ == "__main__":
    try:
        main()
    except MeamtmError as error:
        sys.exit(f"compare: {error}")
    except typer.Exit as stop:  # what had been told to stop has said how to go on
        sys.exit(stop.exit_code)
