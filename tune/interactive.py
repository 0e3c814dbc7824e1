"""A study -> one page on which its trials can be looked at from all sides, without a network."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from meamtm.files import whole_file
from tune.history import search_alone
from tune.plan import Plan

if TYPE_CHECKING:
    from optuna import Study

RATE, DEPTH = "optim.lr", "encoder.depth"
"""What small transformers are most sensitive to: deep ones bear fewer learning rates than shallow ones."""
FEWEST_TRIALS = 2
"""Below so many trained to their end, there is nothing to compare."""


def write_page(plan: Plan, study: "Study", keys: Sequence[str], path: Path) -> Path | None:
    """Writes Optuna's parallel coordinates of some keys, slices, ranks, and with a cost the Pareto front, of the trials
    that trained to their end, where there are any to compare."""
    from optuna.visualization import plot_parallel_coordinate, plot_pareto_front, plot_rank, plot_slice

    trials = search_alone(study)
    if len(trials.trials) < FEWEST_TRIALS:
        return None
    shown = {"target": lambda trial: trial.values[0], "target_name": plan.config.metric}
    there = [key for key in keys if any(key in trial.params for trial in trials.trials)]
    figures = [plot_parallel_coordinate(trials, params=there, **shown), plot_slice(trials, **shown)]
    if any({RATE, DEPTH} <= trial.params.keys() for trial in trials.trials):
        figures.append(plot_rank(trials, params=[RATE, DEPTH], **shown))
    if plan.config.cost is not None:
        figures.append(plot_pareto_front(trials, target_names=plan.metrics))
    parts = [figure.to_html(full_html=False, include_plotlyjs=not number) for number, figure in enumerate(figures)]
    head = f'<!doctype html><meta charset="utf-8"><title>{plan.name}</title>'
    with whole_file(path) as scratch:
        scratch.write_text("\n".join([head, f"<h1>{plan.name}</h1>", *parts]), encoding="utf-8")
    return path
