"""What a report says of a study: which keys matter early and at the end, its figures, and its lines. No Ray cluster."""

import io
import itertools
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from optuna import Study
from optuna.trial import TrialState
from rich.console import Console
from test_tune_search import make_plan

from tune.history import open_study, search_alone, stages
from tune.importance import importances
from tune.plan import Plan
from tune.report import report
from tune.tables import MOST_KEYS, describe

ASHA = ["asha.grace_epochs=1", "asha.reduction=2"]


def searched(plan: Plan) -> Study:
    """A study of 48 trials: the schedule decides who goes on after an epoch, the heads what those are worth then."""
    study = open_study(plan)
    for schedule, heads, lr in itertools.product(("cosine", "step"), (1, 2, 3, 4), np.geomspace(1e-4, 1e-2, 6)):
        study.enqueue_trial({"optim.schedule": schedule, "encoder.heads": heads, "optim.lr": float(lr)})
    for number in np.random.default_rng(0).permutation(48):
        trial = study.ask()
        point = plan.space(trial)
        is_good = point["optim.schedule"] == "cosine"
        trial.report((0.5 if is_good else 0.2) + 0.001 * number, 1)
        if is_good:
            value = 0.5 + 0.1 * float(point["encoder.heads"]) + 0.001 * number  # type: ignore[arg-type]
            trial.report(value, 3)
            study.tell(trial, value)
        else:
            study.tell(trial, state=TrialState.PRUNED)
    return study


def test_what_asha_ended_early_is_compared_where_all_trials_came(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, *ASHA)
    study = searched(plan)
    early, late = stages(study, plan).items()
    assert (early[0], len(early[1].trials)) == ("after 1 epochs", 48)
    assert (late[0], len(late[1].trials)) == ("at the end", 24)
    for way in ("fANOVA", "PED-ANOVA"):
        assert next(iter(importances(early[1])[way])) == "optim.schedule"
        assert next(iter(importances(late[1])[way])) == "encoder.heads"
    assert "optim.step_gamma" not in importances(early[1])["fANOVA"], "some trials do not have it"


@pytest.mark.parametrize("objective", ["valid/accuracy", "valid/loss"])
def test_what_matters_is_what_the_best_have(tmp_path: Path, objective: str) -> None:
    """Rates near 1e-3 are best and all others equally bad, so only the best tell that the rate matters."""
    plan = make_plan(tmp_path, f"objective={objective}")
    study = open_study(plan)
    for number, (heads, lr) in enumerate(itertools.product((1, 2, 3, 4), np.geomspace(1e-4, 1e-2, 11))):
        study.enqueue_trial({"optim.schedule": "cosine", "encoder.heads": heads, "optim.lr": float(lr)})
        trial = study.ask()
        plan.space(trial)
        goodness = (1.0 if 9e-4 < lr < 1.1e-3 else 0.2) + 0.001 * (7 * number % 44)
        study.tell(trial, goodness if objective == "valid/accuracy" else 1 - goodness)
    (at_the_end,) = stages(study, plan).values()
    assert next(iter(importances(at_the_end)["PED-ANOVA"])) == "optim.lr"


def test_trials_that_are_all_equal_tell_nothing_and_break_nothing(tmp_path: Path) -> None:
    plan = make_plan(tmp_path)
    study = open_study(plan)
    for _ in range(12):
        trial = study.ask()
        plan.space(trial)
        study.tell(trial, 0.5)
    assert report(plan)


@pytest.mark.parametrize("words", [["asha.enabled=false"], ["asha.grace_epochs=3"]])
def test_without_early_ends_there_is_one_stage(tmp_path: Path, words: list[str]) -> None:
    plan = make_plan(tmp_path, *words)
    assert plan.grace_epochs is None
    assert list(stages(searched(plan), plan)) == ["at the end"]


def test_a_report_shows_both_stages(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, *ASHA, "space.encoder.depth={int: [1, 3]}")
    searched(plan)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(report(plan))
    said = console.export_text()
    assert "importances after 1 epochs (48 trials)" in said
    assert "importances at the end" in said
    for name in ("importances.png", "sensitivity.png"):
        height, width, _ = imread(plan.folder / "report" / name).shape
        assert width > 1.5 * height, f"{name} has two panels"


def test_a_key_that_no_trial_had_is_missing_from_the_page_and_breaks_nothing(tmp_path: Path) -> None:
    """As the depth, where all trials that came to their end were convolutional networks."""
    depth = "space.encoder.depth={int: [1, 3], when: {optim.schedule: step}}"
    plan = make_plan(tmp_path, *ASHA, depth)
    assert not any("encoder.depth" in trial.params for trial in search_alone(searched(plan)).trials)
    assert report(plan)
    page = (plan.folder / "report" / "interactive.html").read_text(encoding="utf-8")
    assert "optim.lr" in page
    assert "encoder.depth" not in page


def test_of_a_wide_space_the_first_keys_are_told() -> None:
    point = {f"key{number}": number for number in range(MOST_KEYS + 3)}
    said = describe(point)
    assert said == ", ".join([*(f"key{number} {number}" for number in range(MOST_KEYS)), "3 more"])
    assert describe({"optim.lr": 0.00123456}) == "optim.lr 0.001235"
