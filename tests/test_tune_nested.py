"""What a way of choosing is worth: each fold tested by what a study chose that never heard it. Real studies."""

import csv
import json
from pathlib import Path

import pytest
from test_tune_study import call, cluster, recorded, study  # noqa: F401

from meamtm.config import flatten, read_yaml
from meamtm.data.cache import open_clips
from meamtm.data.split import split_clips
from meamtm.errors import ConfigError, DataError
from meamtm.training.run import absolute
from tune.history import open_study, point_of
from tune.nested import choose_each, evaluate_nested, plan_nested
from tune.plan import load_plan

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")
INNER = ["data.test_fold=1", "data.valid_fold=null", "inner_folds=[2,4]"]
SHORT = ["trials=2", "train.epochs=2", "asha.enabled=false", "max_concurrent=1"]


def test_test_fold_and_inner_folds_turn_round_together(study: Path) -> None:  # noqa: F811
    nested = plan_nested(study, INNER)
    turned = {fold: plan.config.inner_folds for fold, plan in nested.plans.items()}
    assert turned == {1: (2, 4), 2: (3, 5), 3: (4, 1), 4: (5, 2), 5: (1, 3)}
    assert [plan.base.data.test_fold for plan in nested.plans.values()] == [1, 2, 3, 4, 5]
    assert nested.plans[1].name == load_plan(study, INNER).name, "the file's own study is one of them"
    assert len({plan.folder for plan in nested.plans.values()}) == 5
    assert plan_nested(study, INNER, [4, 2]).folder == nested.folder
    assert plan_nested(study, [*INNER, "seed=1"]).folder != nested.folder


def test_one_validation_fold_turns_round_too(study: Path) -> None:  # noqa: F811
    plans = plan_nested(study, ["data.test_fold=5", "data.valid_fold=2"]).plans
    assert {fold: plan.base.data.valid_fold for fold, plan in plans.items()} == {1: 3, 2: 4, 3: 5, 4: 1, 5: 2}


def test_no_trial_hears_the_fold_that_its_study_is_tested_on(study: Path) -> None:  # noqa: F811
    for fold, plan in plan_nested(study, INNER).plans.items():
        base = absolute(plan.base)
        clips = open_clips(base.data, base.mel.sample_rate_hz)
        kept = {clip for clip, of in enumerate(clips.folds) if of == fold}
        for run in plan.runs(plan.trial(0, {})):
            split = split_clips(clips, absolute(run).data)
            assert not kept & {*split.train.tolist(), *split.valid.tolist()}
            assert kept == set(split.test.tolist())


@pytest.mark.parametrize(
    ("words", "folds", "error", "message"),
    [
        (["data.valid_fold=null"], [], ConfigError, "data.valid_fold=None: a study chooses on an inner"),
        (INNER, [7], DataError, "has no fold 7; choose from 1, 2, 3, 4, 5"),
        (["data.valid_fold=8"], [], DataError, "has no fold 8"),
    ],
)
def test_what_cannot_be_nested_is_said(study, words, folds, error, message) -> None:  # noqa: F811
    with pytest.raises(error, match=message):
        plan_nested(study, words, folds)


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_each_studys_choice_is_tested_with_each_seed_on_the_fold_it_never_heard(
    cluster: None,  # noqa: F811
    study: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    words, lines = [*INNER, *SHORT], []
    nested = plan_nested(study, words, [1, 3])
    results = choose_each(nested, lines.append)
    result = evaluate_nested(nested, results, 2)
    assert [(row.fold, row.seed) for row in result.rows] == [(1, 0), (3, 0), (1, 1), (3, 1)]
    for row in result.rows:
        plan = nested.plans[row.fold]
        ran = read_yaml(Path(row.run_folder) / "config.yaml")
        chosen = point_of(open_study(plan).trials[results[row.fold].best])
        assert {key: flatten(ran)[key] for key in chosen} == chosen
        assert (ran["data"]["test_fold"], ran["data"]["valid_fold"]) == (row.fold, None)
    for fold, found in results.items():
        assert found.test is not None
        first = next(row for row in result.rows if (row.fold, row.seed) == (fold, 0))
        assert first.run_folder == found.run_folder, "the study's own last run is not trained again"
        assert first.metrics["test/accuracy"] == pytest.approx(found.test["test/accuracy"])
    with (nested.folder / "choices.csv").open() as file:
        assert [(row["fold"], row["study"]) for row in csv.DictReader(file)] == [
            (str(fold), plan.name) for fold, plan in nested.plans.items()
        ]
    assert len(json.loads((nested.folder / "crossval.json").read_text())["rows"]) == 4
    assert nested.folder.name in {name for name, runs in recorded(nested.plans[1]).items() if len(runs) == 4}

    capsys.readouterr()
    call(["nested", str(study), *words, "--folds", "1,3", "--seeds", "2"])  # all is done: only reads
    said = capsys.readouterr().out
    assert "over 4 runs" in said
    assert "to go" not in said
