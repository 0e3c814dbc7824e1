"""Studies over noise: a trial that is the mean of several folds, races, finalists with other seeds, and costs."""

import copy
import re
import shutil
import signal
import statistics
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from mlflow_points import Points, points_of
from optuna.trial import TrialState
from ray.tune.schedulers import TrialScheduler
from rich.console import Console
from scipy.stats import binomtest
from test_tune_study import call, cluster, command, recorded, study, wait_for, write_study  # noqa: F401

from meamtm.config import RunConfig, load, run_folder
from meamtm.errors import ConfigError
from meamtm.model.cost import cost
from meamtm.tracking import read_rows
from meamtm.training.checkpoint import newest
from meamtm.training.evaluate import evaluate
from meamtm.training.run import absolute
from tune.driver import make_scheduler
from tune.finalists import choose, enqueue_finalists, missing_repeats, repeats
from tune.folds import Folds
from tune.history import open_study, point_of, repeat_of, requeue, rows, seed_of, settle, trained
from tune.importance import find_stages
from tune.plan import Plan, load_plan
from tune.race import luck
from tune.report import write_report
from tune.result import Result, Row, pareto_front, read_result
from tune.runs import is_recorded
from tune.search import TruthfulSearch
from tune.study import run_study
from tune.tables import summary

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")
FOLDS = ["data.valid_fold=null", "inner_folds=[2,3]"]


def trial_runs(plan: Plan, trial: Any) -> list[RunConfig]:
    """The runs of an Optuna trial, one for each fold."""
    return [absolute(run) for run in plan.runs(plan.trial(trial.number, point_of(trial), seed_of(trial)))]


def trial_points(plan: Plan) -> dict[str, Points]:
    """What MLflow has of each trial."""
    uri = str(plan.base.tracking.uri)
    return {
        str(run.info.run_name): points_of(uri, run.info.run_id)
        for run in recorded(plan)[plan.name]
        if "trial" in str(run.info.run_name)
    }


# --- the epochs of several folds


@given(values=st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=1, max_size=4))
def test_folds_count_on_and_end_at_the_mean_of_their_last_epochs(values: list[list[float]]) -> None:
    folds, told = Folds("valid/accuracy", 3), []
    for fold in values:
        for epoch, value in enumerate(fold, 1):
            told.append(folds.epoch({"epoch": epoch, "valid/accuracy": value, "train/loss": 0.5}))
        end = folds.end({"epoch": 3, "valid/accuracy": fold[-1], "train/loss": 0.5})
        assert end == told[-1]
    assert [row["epoch"] for row in told] == list(range(1, 3 * len(values) + 1))
    assert [row["valid/accuracy"] for row in told[:3]] == values[0]
    assert told[-1]["valid/accuracy"] == pytest.approx(statistics.fmean(fold[-1] for fold in values))


def test_what_was_copied_does_not_go_on_to_the_next_fold() -> None:
    folds = Folds("m", 3)
    before = copy.copy(folds)
    assert folds.end({"epoch": 3, "m": 1.0}, "01") == {"epoch": 3, "m": 1.0, "hits": "01"}
    assert folds.end({"epoch": 3, "m": 0.0}, "11") == {"epoch": 6, "m": 0.5, "hits": "0111"}
    assert before.epoch({"epoch": 2, "m": 0.3}) == {"epoch": 2, "m": 0.3}


# --- the race


@pytest.mark.parametrize("objective", ["valid/macro_f1", "valid/loss"])
def test_where_accuracy_is_not_compared_hits_end_nobody(study: Path, objective: str) -> None:  # noqa: F811
    plan = load_plan(study, [*FOLDS, "asha.enabled=false", f"objective={objective}"])
    search = TruthfulSearch(plan)
    search.suggest("a")
    end = {"epoch": 8, objective: 0.5, "hits": "1" * 40}
    search.on_trial_result("a", end)
    search.on_trial_complete("a", end)
    scheduler, controller = make_scheduler(plan, open_study(plan)), Any
    trial: Any = SimpleNamespace(trial_id="b", config={"number": search.study.ask().number, "is_repeat": False})
    said = scheduler.on_trial_result(controller, trial, {"epoch": 4, objective: 0.4, "hits": "0" * 20})
    assert said == TrialScheduler.CONTINUE


@given(st.lists(st.sampled_from(["00", "01", "10", "11"]), max_size=60))
def test_luck_is_the_exact_test_of_mcnemar(pairs: list[str]) -> None:
    mine, others = ("".join(pair[place] for pair in pairs) for place in (0, 1))
    lost, won = pairs.count("01"), pairs.count("10")
    expected = binomtest(lost, lost + won, alternative="greater").pvalue if lost + won else 1.0
    assert luck(mine, others) == pytest.approx(expected)
    assert luck(mine, others + "0101") == luck(mine, others), "clips that were not heard yet do not count"


@pytest.mark.parametrize("asha", [True, False])
def test_a_race_ends_who_is_beaten_and_not_by_luck(tmp_path: Path, study: Path, asha: bool) -> None:  # noqa: F811
    plan = load_plan(study, [*FOLDS, f"asha.enabled={str(asha).lower()}", "asha.grace_epochs=3", "asha.reduction=9"])
    search = TruthfulSearch(plan)
    search.suggest("a")
    end = {"epoch": 8, "valid/accuracy": 0.8, "hits": "1" * 16 + "0" * 4 + "1" * 20}
    search.on_trial_result("a", end | {"epoch": 4})
    search.on_trial_result("a", end)
    search.on_trial_complete("a", end)
    scheduler = make_scheduler(plan, open_study(plan))

    def judge(hits: str, epoch: int, *, is_repeat: bool = False, accuracy: float = 0.79) -> str:
        config = {"number": search.study.ask().number, "is_repeat": is_repeat}
        trial: Any = SimpleNamespace(trial_id=f"b{hits}{is_repeat}", config=config)
        controller: Any = None
        scheduler.on_trial_add(controller, trial)
        return scheduler.on_trial_result(controller, trial, {"epoch": epoch, "valid/accuracy": accuracy, "hits": hits})

    beaten, unlucky, whole = "0" * 4 + "1" * 12 + "0" * 4, "0" * 3 + "1" * 13 + "0" * 4, "0" * 40
    assert (luck(beaten, end["hits"]), luck(unlucky, end["hits"])) == (1 / 16, 1 / 8)
    assert judge(beaten, 4) == TrialScheduler.STOP
    assert judge(unlucky, 4) == TrialScheduler.CONTINUE
    assert judge(beaten, 4, is_repeat=True) == TrialScheduler.CONTINUE
    assert judge(beaten, 4, accuracy=0.81) == TrialScheduler.CONTINUE, "of folds that differ in size the mean counts"
    assert judge(whole, 8) == TrialScheduler.CONTINUE, "after its last fold a trial has nothing left to be spared"


@pytest.mark.parametrize(("reduction", "ends_at"), [(2, 1), (3, 2), (4, 3)])
def test_asha_ends_nobody_before_enough_trials_are_there_to_tell(study, reduction: int, ends_at: int) -> None:  # noqa: F811
    plan = load_plan(study, [f"asha.reduction={reduction}", "asha.grace_epochs=1", "train.epochs=40"])
    optuna_study, said = open_study(plan), []
    scheduler = make_scheduler(plan, optuna_study)
    for number in range(6):  # each worse than the one before
        config = {"number": optuna_study.ask().number, "is_repeat": False}
        trial: Any = SimpleNamespace(trial_id=str(number), config=config)
        controller: Any = None
        scheduler.on_trial_add(controller, trial)
        said.append(scheduler.on_trial_result(controller, trial, {"epoch": 1, "valid/accuracy": 0.9 - 0.1 * number}))
    assert said.index(TrialScheduler.STOP) == ends_at
    assert set(said[ends_at:]) == {TrialScheduler.STOP}


@pytest.mark.parametrize("guessing", [0, 60])
def test_rungs_lie_where_they_do_without_pre_training_and_begin_after_it(study, guessing: int) -> None:  # noqa: F811
    words = ["asha.reduction=3", "asha.grace_epochs=10", "train.epochs=120", f"pretrain.epochs={guessing}"]
    plan = load_plan(study, words)
    scheduler: Any = make_scheduler(plan, open_study(plan))
    rungs = sorted(epoch for epoch, _ in scheduler._brackets[0]._rungs)
    assert rungs == [guessing + 10, guessing + 30, guessing + 90]
    assert plan.grace_epochs == rungs[0]
    assert plan.num_epochs == guessing + 120


def test_asha_judges_no_epoch_of_a_trial_anew_when_it_goes_on_under_another_driver(study) -> None:  # noqa: F811
    """The first of six came to its rung when nobody else had; now, judged with the others, it would end there."""
    plan = load_plan(study, ["asha.reduction=2", "asha.grace_epochs=1", "train.epochs=40"])
    optuna_study, controller = open_study(plan), None
    for number in range(6):
        trial = optuna_study.ask()
        trial.report(0.3 + 0.1 * number, 1)
        if number > 0:
            optuna_study.tell(trial, state=TrialState.PRUNED)
    scheduler: Any = make_scheduler(plan, optuna_study)
    continued, fresh = (
        SimpleNamespace(trial_id=str(number), config={"number": number, "is_repeat": False})
        for number in (0, optuna_study.ask().number)
    )
    for trial in (continued, fresh):
        scheduler.on_trial_add(controller, trial)
    second = {"epoch": 1.5, "valid/accuracy": 0.3}
    assert scheduler.on_trial_result(controller, continued, second) == TrialScheduler.CONTINUE
    assert scheduler.on_trial_result(controller, fresh, second) == TrialScheduler.STOP


def test_finalists_are_asked_before_what_a_time_budget_left_in_line(study: Path) -> None:  # noqa: F811
    plan = load_plan(study, ["trials=3", "finalists=2", "finalist_seeds=1"])
    search = TruthfulSearch(plan)
    for number, value in enumerate((0.7, 0.9)):
        search.suggest(str(number))
        search.study.tell(number, value)
    search.suggest("cut short before its first epoch")
    settle(search.study)
    enqueue_finalists(search.study, plan)
    asked = [search.suggest(f"asked {number}") for number in range(3)]
    assert [each["is_repeat"] for each in asked] == [True, True, False]
    assert asked[2]["number"] == 2, "which waits until a search goes on"


@pytest.mark.parametrize(
    "part", [{"set": {"train.keep": "best"}}, {"space": {"train.keep": {"choice": ["last", "best"]}}}]
)
def test_a_study_that_could_not_train_its_best_trial_again_is_refused(study: Path, part: dict[str, Any]) -> None:  # noqa: F811
    settings = yaml.safe_load(study.read_text())
    for section, keys in part.items():
        settings[section] |= keys
    study.write_text(yaml.safe_dump(settings))
    with pytest.raises(ConfigError, match=r"train\.keep=best: .* choose its epoch; set train\.keep=last"):
        run_study(load_plan(study), pytest.fail)


# --- whole studies


@pytest.fixture(scope="module")
def noisy(cluster, tmp_path_factory, packed, cache_dir, migrated):  # noqa: F811
    """A study of three trials of two folds, two of which train again with another seed."""
    path = write_study(tmp_path_factory.mktemp("noisy"), packed, cache_dir, migrated)
    words = [*FOLDS, "trials=3", "asha.enabled=false", "race_p=0", "finalists=2", "finalist_seeds=1"]
    words += ["max_concurrent=1"]  # no process starts twice
    plan, lines = load_plan(path, words), []
    return path, words, plan, run_study(plan, lines.append), lines


@pytest.mark.ray
def test_a_trial_is_worth_the_mean_of_its_folds(noisy) -> None:
    plan = noisy[2]
    searched = trained(open_study(plan))
    assert len(searched) == 3
    for trial in searched:
        runs = trial_runs(plan, trial)
        assert [run.data.valid_fold for run in runs] == [2, 3]
        assert [run.data.test_fold for run in runs] == [1, 1]
        rows = [read_rows(run_folder(run) / "metrics.jsonl") for run in runs]
        assert sorted(trial.intermediate_values) == list(range(1, 9))
        assert trial.value == pytest.approx(statistics.fmean(row[-1]["valid/accuracy"] for row in rows))
        assert not any((run_folder(run) / "test").exists() for run in runs), "a trial never hears the test fold"


@pytest.mark.ray
def test_a_trial_remembers_which_clips_it_named_right(noisy) -> None:
    plan = noisy[2]
    trial = trained(open_study(plan))[0]
    named = ""
    for run in trial_runs(plan, trial):
        checkpoint = newest(run_folder(run))
        assert checkpoint is not None
        found = evaluate(checkpoint, fold=run.data.valid_fold)
        named += "".join(str(int(hit)) for hit in found.probability.argmax(1) == found.target.argmax(1))
    assert trial.user_attrs["hits"] == named
    assert len(named) == 40


@pytest.mark.ray
def test_the_best_trials_train_again_with_other_seeds_which_choose(noisy) -> None:
    _, _, plan, result, lines = noisy
    optuna_study = open_study(plan)
    ranked = sorted(trained(optuna_study), key=lambda trial: (-(trial.value or 0), trial.number))
    again = Counter(repeat for trial in optuna_study.trials if (repeat := repeat_of(trial)) is not None)
    assert again == {(trial.number, seed): 1 for trial in ranked[:2] for seed in [1]}
    for trial in optuna_study.trials:
        if (repeat := repeat_of(trial)) is not None:
            assert trial.state.name == "COMPLETE"
            assert {run.train.seed for run in trial_runs(plan, trial)} == {repeat.seed}
            assert trial.params == optuna_study.trials[repeat.number].params
    means = {trial.number: statistics.fmean(repeats(optuna_study, trial.number)) for trial in ranked[:2]}
    assert result.best == max(means, key=lambda number: (means[number], -number))
    assert sum(line.startswith("finalist ") for line in lines) == 2


@pytest.mark.ray
def test_finalists_are_recorded_and_shown(noisy, capsys) -> None:
    path, words, plan, result, _ = noisy
    below = recorded(plan)
    assert len(below[plan.name]) == 5
    (parent,) = (run for run in below[""] if run.info.run_name == plan.name)
    again = statistics.fmean(repeats(open_study(plan), result.best))
    assert parent.data.metrics["best/value_with_other_seeds"] == pytest.approx(again)
    assert {run.info.status for runs in below.values() for run in runs} == {"FINISHED"}
    assert sorted(run.data.tags.get("optuna.repeats", "") for run in below[plan.name])[:3] == ["", "", ""]
    assert run_study(plan, pytest.fail) == result == read_result(plan)
    call(["report", str(path), *words])
    said = capsys.readouterr().out
    assert "finalists, with other seeds" in said
    assert said.count("complete") == 3, "the trials' table shows the search"


@pytest.mark.ray
def test_trials_of_several_folds_are_sent_to_a_server_that_lacks_them(noisy, tmp_path: Path) -> None:
    path, words, plan, result, _ = noisy
    shutil.copytree(plan.folder, tmp_path / "studies" / plan.name)
    for memo in (tmp_path / "studies").rglob("mlflow.json"):
        memo.unlink()
    shutil.rmtree(next((tmp_path / "studies").glob("*/trials/trial-0000-????????")))  # as if MLflow had been away then
    places = [f"studies_dir={tmp_path}/studies", f"tracking.uri=sqlite:///{tmp_path}/other.db"]
    late = load_plan(path, [*words, *places])
    assert not is_recorded(late, result)
    told = run_study(late, pytest.fail)
    assert told.mlflow_uri == late.base.tracking.uri
    assert replace(told, mlflow_uri=result.mlflow_uri, mlflow_run_id=result.mlflow_run_id) == result
    assert trial_points(late) == trial_points(plan)
    assert is_recorded(late, result)


@pytest.mark.ray
def test_more_finalists_are_added_to_a_finished_study(noisy) -> None:
    path, words, plan, _, _ = noisy
    more, lines = load_plan(path, [*words, "finalists=3"]), []
    result = run_study(more, lines.append)
    assert result.study == plan.name
    assert sum(line.startswith("finalist ") for line in lines) == 1, "those that are there do not train again"
    assert sum(row.repeats is not None for row in result.rows) == 3
    assert sum(row.repeats is None for row in result.rows) == 3


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_study_that_is_killed_in_its_second_fold_ends_as_one_that_was_not(noisy, tmp_path: Path) -> None:
    """Losses on one thread repeat bit for bit, so the trial's epochs must too."""
    path, _, plan, _, _ = noisy
    words = [*FOLDS, "trials=1", "asha.enabled=false", f"studies_dir={tmp_path}", "max_concurrent=1"]
    killed = load_plan(path, words)
    with command(path, *words) as driver:
        wait_for(driver, "to go")
        while not list(killed.folder.glob("trials/*fold-3*/epoch-*")):
            assert driver.poll() is None
        driver.send_signal(signal.SIGKILL)
    run_study(killed, lambda _: None)
    (trial,) = trained(open_study(killed))
    expected = open_study(plan).trials[0]
    assert trial.params == expected.params
    assert trial.intermediate_values == expected.intermediate_values
    assert trial.user_attrs["hits"] == expected.user_attrs["hits"]
    told, expected_points = (
        {point for point in trial_points(each)["trial-0000"] if not point[0].startswith("time/")}
        for each in (killed, plan)
    )
    assert told == expected_points


@pytest.mark.ray
def test_a_study_of_two_objectives_finds_the_best_for_each_cost(cluster, study: Path) -> None:  # noqa: F811
    settings = yaml.safe_load(study.read_text())
    settings["space"]["encoder.heads"] = {"int": [1, 8]}
    settings["set"] = {key: value for key, value in settings["set"].items() if key not in settings["space"]}
    settings |= {"objective": ["valid/accuracy", "macs"], "trials": 2, "max_concurrent": 1}
    study.write_text(yaml.safe_dump(settings))
    plan = load_plan(study)
    result = run_study(plan, lambda _: None)
    assert [row.state for row in result.rows] == ["COMPLETE"] * 2, "a cheap trial is not stopped for being worse"
    for row in result.rows:
        assert row.cost == cost(plan.trial(row.number, row.point)).num_macs
    assert (plan.folder / "report" / "pareto.png").stat().st_size > 5_000
    assert result.best_row.value == max(row.value or 0 for row in result.rows)
    front = pareto_front(result.rows, "max")
    console = Console(width=160, record=True)
    console.print(summary(result))
    shown = console.export_text()
    for row in front:
        file = plan.folder / "report" / f"pareto-trial-{row.number}.yaml"
        assert file.name in shown
        assert load(file) == plan.chosen(row.point), "ready for meamtm train"
    assert len(list((plan.folder / "report").glob("pareto-trial-*.yaml"))) == len(front)
    page = (plan.folder / "report" / "interactive.html").read_text()
    assert "Pareto-front Plot" in page


@pytest.mark.parametrize(("mode", "numbers"), [("max", [1, 3, 5, 6]), ("min", [6])])
def test_the_pareto_front_is_what_no_cheaper_trial_equals(mode: str, numbers: list[int]) -> None:
    points = [(0.9, 40.0), (0.9, 30.0), (0.7, 50.0), (0.8, 20.0), (0.5, 20.0), (0.4, 5.0), (0.3, 1.0), (0.3, 1.0)]
    trials = [Row(number, "COMPLETE", value, 1, 1.0, {}, None, price) for number, (value, price) in enumerate(points)]
    again = Row(8, "COMPLETE", 1.0, 1, 1.0, {}, None, 0.5, repeats=1, seed=1)
    stopped = Row(9, "PRUNED", 1.0, 1, 1.0, {}, None)
    assert [row.number for row in pareto_front([*trials, again, stopped], mode)] == numbers


def test_a_report_forgets_configurations_that_left_the_front(study: Path) -> None:  # noqa: F811
    plan = load_plan(study, ["objective=[valid/accuracy,macs]"])
    optuna_study = open_study(plan)
    for values, expected in (((0.8, 2e6), {0}), ((0.7, 1e6), {0, 1}), ((0.9, 1e6), {2})):
        trial = optuna_study.ask()
        plan.space(trial)
        optuna_study.tell(trial, values)
        write_report(plan, optuna_study, find_stages(plan, optuna_study))
        left = {int(path.stem.rsplit("-", 1)[1]) for path in (plan.folder / "report").glob("pareto-trial-*.yaml")}
        assert left == expected


def test_finalists_of_two_objectives_lie_on_the_front_or_behind_it(study: Path) -> None:  # noqa: F811
    plan = load_plan(study, ["objective=[valid/accuracy,macs]", "finalists=3", "finalist_seeds=1"])
    optuna_study = open_study(plan)
    points = [(0.9, 40.0), (0.9, 30.0), (0.7, 50.0), (0.8, 20.0), (0.5, 20.0), (0.4, 5.0), (0.3, 1.0)]
    for values in points:
        optuna_study.tell(optuna_study.ask(), values)
    enqueue_finalists(optuna_study, plan)
    again = [repeat.number for trial in optuna_study.trials if (repeat := repeat_of(trial)) is not None]
    assert again == [1, 3, 5]
    for value in (0.6, 0.8, 0.1):
        optuna_study.tell(optuna_study.ask(), [value, 1.0])
    chosen = choose(optuna_study, plan)
    assert chosen is not None
    assert chosen.number == 3

    enqueue_finalists(optuna_study, load_plan(study, ["objective=[valid/accuracy,macs]", "finalists=6"]))
    again = [(repeat.number, repeat.seed) for trial in optuna_study.trials if (repeat := repeat_of(trial)) is not None]
    front, behind = (1, 3, 5, 6), (0, 4)
    assert set(again) == {(number, seed) for number in (*front, *behind) for seed in (1, 2)}


def test_fewer_finalists_than_an_earlier_command_wanted(study: Path) -> None:  # noqa: F811
    optuna_study = open_study(load_plan(study))
    for value in (0.7, 0.9, 0.8):
        optuna_study.tell(optuna_study.ask(), value)

    def in_line() -> list[tuple[int, int]]:
        trials = [trial for trial in optuna_study.trials if trial.state.name == "WAITING"]
        return [(repeat.number, repeat.seed) for trial in trials if (repeat := repeat_of(trial)) is not None]

    enqueue_finalists(optuna_study, load_plan(study, ["finalists=3", "finalist_seeds=2"]))
    assert in_line() == [(1, 1), (1, 2), (2, 1), (2, 2), (0, 1), (0, 2)]
    enqueue_finalists(optuna_study, load_plan(study, ["finalists=2", "finalist_seeds=1"]))
    assert in_line() == [(1, 1), (2, 1)]
    assert len(trained(optuna_study)) == 3, "what was taken out of line is no trial of the search"
    enqueue_finalists(optuna_study, load_plan(study, ["finalists=3", "finalist_seeds=1"]))
    assert in_line() == [(1, 1), (2, 1), (0, 1)]
    enqueue_finalists(optuna_study, load_plan(study, ["finalists=1"]))
    assert in_line() == []


def test_all_that_trained_again_may_be_chosen(study: Path) -> None:  # noqa: F811
    """Two more trials push the finalists of an earlier command out; what they were worth with other seeds stays."""
    plan = load_plan(study, ["finalists=2", "finalist_seeds=1"])
    optuna_study = open_study(plan)
    for values in ((0.7, 0.8), (0.6, 0.9), (0.91, 0.92), (0.5, 0.5)):  # the search's two, and those two again
        for value in values:
            optuna_study.tell(optuna_study.ask(), value)
        enqueue_finalists(optuna_study, plan)
    chosen = choose(optuna_study, plan)
    assert chosen is not None
    assert chosen.number == 0


def test_a_finalists_run_that_failed_is_missed_and_tried_again_by_the_next_command(study: Path) -> None:  # noqa: F811
    plan = load_plan(study, ["finalists=2", "finalist_seeds=1"])
    optuna_study = open_study(plan)
    for value in (0.7, 0.8):
        optuna_study.tell(optuna_study.ask(), value)
    enqueue_finalists(optuna_study, plan)
    optuna_study.tell(optuna_study.ask(), state=TrialState.FAIL)  # for a full disk, say
    optuna_study.tell(optuna_study.ask(), 0.6)
    assert missing_repeats(optuna_study, plan) == [(1, 1)]
    enqueue_finalists(optuna_study, plan)
    optuna_study.tell(optuna_study.ask(), 0.65)
    assert missing_repeats(optuna_study, plan) == []
    enqueue_finalists(optuna_study, plan)
    assert not any(trial.state.name == "WAITING" for trial in optuna_study.trials)
    assert choose(optuna_study, plan) == optuna_study.trials[1]


def test_finalists_are_no_trials_that_tpe_could_learn_from_nor_asha_judge_by(study: Path) -> None:  # noqa: F811
    plan = load_plan(study, ["finalists=2", "finalist_seeds=2", "startup_trials=8", "asha.grace_epochs=2"])
    search = TruthfulSearch(plan)
    for value in (0.7, 0.8):
        search.study.tell(search.study.ask(), value)
    enqueue_finalists(search.study, plan)
    for value in (0.6, 0.5, 0.9, 0.4):
        search.study.tell(search.study.ask(), value)
    search.suggest("one more")
    assert search.study.sampler._n_startup_trials == 8 + 4

    scheduler: Any = make_scheduler(plan, search.study)
    before = [dict(recorded) for _, recorded in scheduler._brackets[0]._rungs]
    repeat: Any = SimpleNamespace(trial_id="again", config={"number": 2, "is_repeat": True})
    scheduler.on_trial_add(None, repeat)
    scheduler.on_trial_complete(None, repeat, {"epoch": 4, "valid/accuracy": 0.99})
    assert [dict(recorded) for _, recorded in scheduler._brackets[0]._rungs] == before


@pytest.mark.parametrize(
    ("before", "now", "is_covered"),
    [((3, 2), (3, 2), True), ((3, 2), (1, 2), False), ((1, 2), (1, 5), True), ((1, 2), (2, 2), False)],
)
def test_a_result_answers_for_the_finalists_that_it_had(
    study: Path,  # noqa: F811
    before: tuple[int, int],
    now: tuple[int, int],
    is_covered: bool,
) -> None:
    config = load_plan(study, [f"finalists={now[0]}", f"finalist_seeds={now[1]}", "trials=1"]).config
    row = Row(0, "COMPLETE", 0.5, 4, 1.0, {}, None)
    result = Result("s", "s", "m", 1, None, (row,), 0, "r", "c", None, None, None, *before)
    assert result.covers(config) == is_covered


def test_the_time_of_a_trial_that_was_parted_is_not_told(study: Path) -> None:  # noqa: F811
    """Optuna counts from when it was asked last."""
    optuna_study = open_study(load_plan(study))
    optuna_study.ask()
    requeue(optuna_study)
    for _ in range(2):
        optuna_study.tell(optuna_study.ask(), 0.5)
    first, second = rows(optuna_study)
    assert first.elapsed_s is None
    assert second.elapsed_s is not None


def test_a_trial_of_two_objectives_that_a_time_budget_cuts_short_is_back_in_line(study: Path) -> None:  # noqa: F811
    """Told as PRUNED with half of its epochs it would end every later search: TPE asks for the one direction."""
    search = TruthfulSearch(load_plan(study, ["objective=[valid/accuracy,macs]", "startup_trials=1"]))
    for name in "ab":
        search.suggest(name)
        search.on_trial_result(name, {"epoch": 1, "valid/accuracy": 0.5})
    search.on_trial_complete("a", {"epoch": 4, "valid/accuracy": 0.5})
    settle(search.study)
    assert [trial.state.name for trial in search.study.trials] == ["COMPLETE", "WAITING"]
    assert [search.suggest(name)["number"] for name in "cd"] == [1, 2]


def test_a_finalist_that_a_time_budget_cuts_short_is_back_in_line(study: Path) -> None:  # noqa: F811
    optuna_study = open_study(load_plan(study))
    optuna_study.enqueue_trial({}, user_attrs={"repeats": (0, 1)})
    finalist, other = optuna_study.ask(), optuna_study.ask()
    for trial in (finalist, other):
        trial.report(0.5, 1)
    settle(optuna_study)
    assert [trial.state.name for trial in optuna_study.trials] == ["WAITING", "PRUNED"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inner_folds=[2,3]"], r"data\.valid_fold=2: inner_folds=\[2, 3\] says which folds validate; leave one out"),
        (["data.valid_fold=null", "inner_folds=[1,2]"], r"inner_folds=\[1, 2\] holds data\.test_fold=1, so choices"),
        (["data.valid_fold=null", "inner_folds=[2,2]"], r"inner_folds=\[2, 2\] names fold 2 twice; name each once"),
        (
            ["data.valid_fold=null", "inner_folds=[2,9]"],
            r"inner_folds=\[2, 9\]: .* no clip in fold 9; name .*: 1, 2",
        ),
        (["objective=[valid/accuracy,euros]"], r"objective.*'params', 'macs' or 'tokens'"),
        (["objective=valid/acc"], r"objective.*'valid/accuracy', 'valid/macro_f1', 'valid/map' or 'valid/loss'"),
        (["objective=valid/map"], r"objective=valid/map: clips of .* have one label each"),
        (["finalists=0"], r"finalists=0"),
    ],
)
def test_a_mistake_in_folds_finalists_or_costs_gets_one_line(study, words, message, capfd) -> None:  # noqa: F811
    with pytest.raises(SystemExit, match="2"):
        call([str(study), *words])
    err = capfd.readouterr().err
    assert re.search(message, err), err
    assert len(err.strip().splitlines()) == 1
