"""A study's trials -> how much each key decides, in two ways, at each stage where trials can be compared."""

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tune.history import stages
from tune.plan import Plan

if TYPE_CHECKING:
    from optuna import Study

FEWEST_TRIALS = 5
"""Below so many, importances would be noise alone."""
BEST_FEW = 5
"""The fewest best trials that PED-ANOVA tells from all, by its authors' advice; of less than ten trials it is half."""


@dataclass(frozen=True)
class Stage:
    """Trials that can be compared with each other, and how much each key decides among them."""

    study: "Study"
    importances: dict[str, dict[str, float]]
    """Evaluator -> key -> importance, largest first; empty of too few trials, or where all are worth the same."""


def find_stages(plan: Plan, study: "Study") -> dict[str, Stage]:
    """Gives a study's `stages` by name, with the importances, which take seconds each."""
    return {name: Stage(trials, importances(trials)) for name, trials in stages(study, plan).items()}


def importances(study: "Study") -> dict[str, dict[str, float]]:
    """How much each key decides, by two ways of looking at one of the study's `stages`; empty where there are too few
    trials, or where all are worth the same.

    fANOVA: what share of the objective's variation a key explains (Hutter 2014); keys that exist in all trials only.
    PED-ANOVA: whether a key tells the best tenth, or the best few, from all (Watanabe 2023). Largest first."""
    from optuna.importance import FanovaImportanceEvaluator, PedAnovaImportanceEvaluator, get_param_importances
    from optuna.study import StudyDirection

    num_trials = len(study.trials)
    if num_trials < FEWEST_TRIALS or len({trial.values[0] for trial in study.trials}) == 1:
        return {}
    best = max(0.1, min(0.5, BEST_FEW / num_trials))
    sign = -1 if study.directions[0] is StudyDirection.MAXIMIZE else 1  # PED-ANOVA takes low values for good ones
    ways = {
        "fANOVA": FanovaImportanceEvaluator(seed=0),
        "PED-ANOVA": PedAnovaImportanceEvaluator(target_quantile=best),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # optuna's, of keys that exist in some trials only, and of that sign
        return {
            way: get_param_importances(study, evaluator=evaluator, target=lambda trial: sign * (trial.values or [])[0])
            for way, evaluator in ways.items()
        }
