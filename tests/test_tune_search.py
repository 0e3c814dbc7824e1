"""The searcher tells Optuna the truth, and another searcher over the same file continues the study. No Ray cluster."""

import csv
import math
import re

import pytest
from optuna.trial import TrialState

from meamtm.config import from_flat
from meamtm.data.pack import pack
from meamtm.errors import ConfigError
from meamtm.model.cost import cost
from tune.history import open_study, ranked, requeue, rows, settle, trained
from tune.limits import excess
from tune.plan import Plan, load_plan
from tune.search import TruthfulSearch

STUDY = """
name: s
set:
  data: {valid_fold: 2}
  train: {epochs: 3}
  encoder: {stem_channels: [8, 16], head_dim: 16}
space:
  optim.lr: {log_uniform: [1.0e-4, 1.0e-2]}
  optim.schedule: {choice: [cosine, step]}
  optim.step_gamma: {uniform: [0.1, 0.9], when: {optim.schedule: step}}
  encoder.heads: {int: [1, 4]}
"""


@pytest.fixture
def plan(tmp_path) -> Plan:
    return make_plan(tmp_path)


def make_plan(folder, *words: str) -> Plan:
    (folder / "study.yaml").write_text(STUDY)
    return load_plan(folder / "study.yaml", [f"studies_dir={folder}/studies", *words])


def report(search: TruthfulSearch, trial_id: str, *values: float) -> dict[str, float]:
    result = {}
    for epoch, value in enumerate(values, start=1):
        result = {"epoch": epoch, "valid/accuracy": value, "training_iteration": epoch}
        search.on_trial_result(trial_id, result)
    return result


def test_each_end_is_told_as_it_was(plan):
    search = TruthfulSearch(plan)
    for trial_id in "abcde":
        search.suggest(trial_id)
    search.on_trial_complete("a", report(search, "a", 0.1, 0.2, 0.9))
    search.on_trial_complete("b", report(search, "b", 0.1, 0.2))
    search.on_trial_complete("c", report(search, "c", 0.1, 0.2, math.nan))
    report(search, "d", 0.3)
    search.on_trial_complete("d", error=True)
    search.on_trial_result("e", {"failure": "loss is not finite at step 7"})
    search.on_trial_complete("e", {"failure": "loss is not finite at step 7"})

    told = [(trial.state, trial.value, trial.intermediate_values) for trial in open_study(plan).trials]
    assert told == [
        (TrialState.COMPLETE, 0.9, {1: 0.1, 2: 0.2, 3: 0.9}),
        (TrialState.PRUNED, 0.2, {1: 0.1, 2: 0.2}),
        (TrialState.FAIL, None, {1: 0.1, 2: 0.2}),
        (TrialState.FAIL, None, {1: 0.3}),
        (TrialState.FAIL, None, {}),
    ]
    errors = [row.error for row in rows(open_study(plan))]
    assert errors[2:] == ["no finite valid/accuracy was reported", "its worker died", "loss is not finite at step 7"]


def test_an_early_stop_keeps_the_epoch_that_it_was_stopped_at(plan):
    """Tune passes the last result of a stopped trial to `on_trial_complete` alone."""
    search = TruthfulSearch(plan)
    search.suggest("a")
    report(search, "a", 0.1)
    search.on_trial_complete("a", {"epoch": 2, "valid/accuracy": 0.4})
    (trial,) = open_study(plan).trials
    assert (trial.state, trial.value, trial.intermediate_values) == (TrialState.PRUNED, 0.4, {1: 0.1, 2: 0.4})


def test_a_trial_of_a_killed_driver_is_asked_again_with_its_number_and_values(plan):
    first = TruthfulSearch(plan)
    asked = [first.suggest(trial_id) for trial_id in "abc"]
    first.on_trial_complete("a", report(first, "a", 0.1, 0.2, 0.3))
    report(first, "b", 0.5)

    study = open_study(plan)
    assert requeue(study) == 2
    second = TruthfulSearch(plan)
    assert [second.suggest(trial_id) for trial_id in "de"] == asked[1:]
    assert second.suggest("f")["number"] == 3
    second.on_trial_complete("d", report(second, "d", 0.5, 0.6, 0.7))
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "COMPLETE", "RUNNING", "RUNNING"]


def test_a_resumed_study_suggests_what_an_uninterrupted_one_does(tmp_path):
    def suggestions(folder, *restarts: int) -> list[dict]:
        plan = make_plan(folder)
        runs, search = [], TruthfulSearch(plan)
        for number in range(12):
            if number in restarts:
                requeue(open_study(plan))
                search = TruthfulSearch(plan)
            runs.append(search.suggest(str(number))["run"])
            search.on_trial_complete(str(number), report(search, str(number), *[runs[-1]["optim.lr"]] * 3))
        return [{key: value for key, value in run.items() if key != "runs_dir"} for run in runs]

    for name in ("whole", "resumed"):
        (tmp_path / name).mkdir()
    whole, resumed = suggestions(tmp_path / "whole"), suggestions(tmp_path / "resumed", 4, 11)
    assert whole == resumed
    assert len({run["optim.lr"] for run in whole}) == 12


def test_start_points_come_first_and_once(tmp_path):
    plan = make_plan(
        tmp_path, "start=[{optim.lr: 1e-3, encoder.heads: 2}, {optim.schedule: step, optim.step_gamma: 0.5}]"
    )
    first = TruthfulSearch(plan).suggest("a")["run"]
    assert first["tracking.uri"] is None, "Tune writes down what it passes on, and an address may hold a password"
    assert (first["optim.lr"], first["encoder.heads"]) == (1e-3, 2)
    second = TruthfulSearch(plan).suggest("b")["run"]
    assert (second["optim.schedule"], second["optim.step_gamma"]) == ("step", 0.5)
    assert TruthfulSearch(plan).suggest("c")["number"] == 2


def test_each_start_point_gets_values_of_its_own_for_what_it_leaves_out(tmp_path):
    plan = make_plan(tmp_path, "start=[{encoder.heads: 1}, {encoder.heads: 2}, {encoder.heads: 3}]")
    search = TruthfulSearch(plan)
    runs = [search.suggest(name)["run"] for name in "abc"]
    assert [run["encoder.heads"] for run in runs] == [1, 2, 3]
    assert len({run["optim.lr"] for run in runs}) == 3


def test_start_points_over_the_limits_are_told(tmp_path):
    plan = make_plan(tmp_path, "limits.max_params=40000", "start=[{encoder.heads: 4}, {encoder.heads: 1}]")
    search = TruthfulSearch(plan)
    assert search.suggest("a")["run"]["encoder.heads"] == 1
    [told] = search.refusals
    assert re.fullmatch(
        r"the start point \{'encoder\.heads': 4\} is left out: \d+ exceed limits\.max_params=40000", told
    )


def test_what_does_not_fit_into_memory_is_rejected_and_another_takes_its_place(tmp_path):
    no = ("space.optim.lr=null", "space.optim.step_gamma=null", "space.optim.schedule=null")
    search = TruthfulSearch(make_plan(tmp_path, *no, "trials=3", "max_failed_trials=0"))
    heads = [search.suggest(name)["run"]["encoder.heads"] for name in "abc"]
    reason = "train.batch_size=32 takes 9.0 GB at training's peak, and there are 6.0 GB for each of 2"
    search.on_trial_complete("a", {"failure": reason, "excess": 0.5})
    search.on_trial_complete("b", report(search, "b", 0.1, 0.2, 0.3))
    too_large = open_study(search.plan).trials[0]
    assert (too_large.state, too_large.constraints["memory"]) == (TrialState.PRUNED, 0.5)
    assert too_large.user_attrs["rejected"] == reason
    assert [trial.number for trial in trained(open_study(search.plan))] == [1]
    search.check_failures()  # of which this is none
    assert search.suggest("d")["run"]["encoder.heads"] not in heads
    assert search.suggest("e") == search.FINISHED, "what was too large is not tried again"


def test_a_search_in_which_nothing_fits_into_memory_ends(tmp_path):
    search = TruthfulSearch(make_plan(tmp_path))
    for number in range(50):
        search.suggest(str(number))
        search.on_trial_complete(str(number), {"failure": "train.batch_size=32 takes 9.0 GB", "excess": 0.5})
    with pytest.raises(
        ConfigError, match=r"50 trials in a row do not fit into memory, the last of them, trial 49, .* narrow the space"
    ):
        search.suggest("last")
    search = TruthfulSearch(search.plan)
    assert search.suggest("on a larger machine")["number"] == 50


def test_what_fails_is_not_tried_again_unless_its_worker_died(tmp_path):
    no = ("space.optim.lr=null", "space.optim.step_gamma=null", "space.optim.schedule=null")
    search = TruthfulSearch(make_plan(tmp_path, *no, "space.encoder.heads={int: [1, 3]}"))
    heads = [search.suggest(name)["run"]["encoder.heads"] for name in "abc"]
    search.on_trial_complete("a", report(search, "a", math.nan))
    search.on_trial_complete("b", error=True)
    search.on_trial_complete("c", report(search, "c", 0.1, 0.2, 0.3))
    assert search.suggest("d")["run"]["encoder.heads"] == heads[1]
    search.on_trial_complete("d", error=True)
    found = search.suggest("e")
    while found != search.FINISHED:
        assert found["run"]["encoder.heads"] == heads[1], "TPE may name it once more"
        found = search.suggest("f")
    assert search.exhausted is not None


def test_refused_suggestions_are_no_trials_that_tpe_could_learn_from(tmp_path):
    plan = make_plan(tmp_path, "limits.max_params=40000", "startup_trials=2")
    search = TruthfulSearch(plan)
    for number in range(4):
        search.suggest(str(number))
    refused = [trial for trial in search.study.trials if "rejected" in trial.user_attrs]
    search.suggest("last")
    assert refused
    assert search.study.sampler._n_startup_trials >= 2 + len(refused)


def test_limits_and_costs_count_the_classes_that_the_data_set_has(tmp_path, sounds):
    with (sounds / "synth.csv").open() as table:
        few = [row for row in csv.DictReader(table) if int(row["target"]) < 3]
    (tmp_path / "few.csv").write_text("path,label\n" + "".join(f"{row['filename']},{row['category']}\n" for row in few))
    pack(sounds / "audio", tmp_path / "few", tmp_path / "few.csv")
    words = [f"data.path={tmp_path}/few", "objective=[valid/accuracy,params]"]
    plan = make_plan(tmp_path, *words)
    search = TruthfulSearch(plan)
    run = from_flat(search.suggest("a")["run"])
    search.on_trial_complete("a", report(search, "a", 0.1, 0.2, 0.3))
    num_params = cost(run, 3).num_params
    assert open_study(plan).trials[0].values == [0.3, num_params]
    assert num_params < cost(run).num_params, "with ten classes"
    point = {key: run_value for key, run_value in search.suggest("b")["run"].items() if key in plan.space.ranges}
    fits = cost(plan.trial(1, point), 3).num_params
    for limit, is_over in ((fits, False), (fits - 1, True)):
        over, _ = excess(make_plan(tmp_path, *words, f"limits.max_params={limit}"), 1, point)
        assert (over > 0) == is_over


def test_what_exceeds_a_limit_is_rejected_and_not_counted(tmp_path):
    plan = make_plan(tmp_path, "limits.max_params=40000", "trials=3")
    search = TruthfulSearch(plan)
    heads = [search.suggest(str(index))["run"]["encoder.heads"] for index in range(6)]
    study = open_study(plan)
    refused = [trial for trial in study.trials if "rejected" in trial.user_attrs]
    assert refused, "the space reaches over the limit, so something must have been refused"
    assert {trial.state for trial in refused} == {TrialState.PRUNED}
    assert all(trial.params["encoder.heads"] > max(heads) for trial in refused)
    assert trained(study) == []
    assert "exceed limits.max_params=40000" in refused[0].user_attrs["rejected"]


def test_a_spectrogram_whose_bands_stay_empty_is_rejected_and_no_failure(tmp_path):
    no = ("space.optim.lr=null", "space.optim.step_gamma=null", "space.optim.schedule=null", "space.encoder.heads=null")
    plan = make_plan(tmp_path, *no, "mel.hop_ms=8", "space.mel.window_ms={choice: [8, 64]}", "max_failed_trials=1")
    search = TruthfulSearch(plan)
    assert search.suggest("a")["run"]["mel.window_ms"] == 64
    assert search.suggest("b") == search.FINISHED
    empty = [each for each in open_study(plan).trials if "bands lie between" in each.user_attrs.get("rejected", "")]
    assert {trial.state for trial in empty} == {TrialState.PRUNED}


def test_no_trial_is_trained_twice_and_an_exhausted_space_ends_the_search(tmp_path):
    plan = make_plan(
        tmp_path, "space.optim.lr=null", "space.optim.step_gamma=null", "space.encoder.heads={int: [1, 2]}"
    )
    search = TruthfulSearch(plan)
    points = []
    for name in "abcd":
        run = search.suggest(name)["run"]
        points.append((run["encoder.heads"], run["optim.schedule"]))
        if name != "a":  # which goes on training
            search.on_trial_complete(name, report(search, name, 0.1, 0.2, 0.3))
    assert len(set(points)) == 4
    assert search.suggest("e") == search.FINISHED
    assert search.exhausted == "1,000 points drawn at random were all tried or refused before"
    turned_down = [trial for trial in open_study(plan).trials if "rejected" in trial.user_attrs]
    assert {trial.state for trial in turned_down} == {TrialState.FAIL}
    assert len(trained(open_study(plan))) == 3
    search.check_failures()  # of which those are none

    search.on_trial_complete("a", error=True)
    again = search.suggest("f")["run"]
    assert (again["encoder.heads"], again["optim.schedule"]) == points[0], "what failed may be tried once more"


def test_a_search_whose_limits_leave_only_what_was_tried_says_so(tmp_path):
    plan = make_plan(
        tmp_path,
        "limits.max_params=40000",
        "space.optim.lr=null",
        "space.optim.step_gamma=null",
        "start=[{encoder.heads: 1}]",
    )
    search = TruthfulSearch(plan)
    names = iter(range(1000))
    while isinstance(search.suggest(str(next(names))), dict):
        pass
    assert search.exhausted == "1,000 points drawn at random were all tried or refused before"
    heads = [trial.params["encoder.heads"] for trial in open_study(plan).trials if "rejected" not in trial.user_attrs]
    assert len(heads) == len(set(heads)) * 2, "with each schedule once"


def test_a_space_of_few_points_is_searched_to_its_last(tmp_path):
    """TPE would name the best again and again."""
    no = ("space.optim.lr=null", "space.optim.step_gamma=null", "space.optim.schedule=null")
    search = TruthfulSearch(make_plan(tmp_path, *no, "space.encoder.heads={int: [1, 24]}", "startup_trials=4"))
    heads = []
    for number in range(24):
        heads.append(search.suggest(str(number))["run"]["encoder.heads"])
        search.on_trial_complete(str(number), report(search, str(number), *[1 - abs(heads[-1] - 7) / 24] * 3))
    assert sorted(heads) == list(range(1, 25))


def test_limits_that_nothing_meets_end_the_study(tmp_path):
    search = TruthfulSearch(make_plan(tmp_path, "limits.max_params=10"))
    with pytest.raises(ConfigError, match=r"limits: 50 suggestions in a row .* loosen the limits or narrow the space"):
        search.suggest("a")


def test_too_many_failures_end_the_study(tmp_path):
    search = TruthfulSearch(make_plan(tmp_path, "max_failed_trials=1"))
    for trial_id in "ab":
        search.suggest(trial_id)
        search.on_trial_complete(trial_id, error=True)
    with pytest.raises(
        ConfigError, match="max_failed_trials=1: 2 trials have failed, the last of them, trial 1, by: its worker died"
    ):
        search.suggest("c")
    again = TruthfulSearch(make_plan(tmp_path, "max_failed_trials=1"))  # the same command, where there is room again
    for trial_id in "de":
        again.suggest(trial_id)
        again.on_trial_complete(trial_id, error=True)
    with pytest.raises(ConfigError, match="2 trials have failed"):
        again.suggest("f")


def test_a_time_budget_prunes_what_it_cuts_short(plan):
    search = TruthfulSearch(plan)
    for trial_id in "ab":
        search.suggest(trial_id)
    report(search, "a", 0.1, 0.4)
    settle(open_study(plan))
    cut, untouched = open_study(plan).trials
    assert (cut.state, cut.value, cut.user_attrs["stopped_by"]) == (TrialState.PRUNED, 0.4, "time_budget_s")
    assert untouched.state == TrialState.WAITING


def test_the_best_trial_is_one_that_trained_to_its_end(plan):
    search = TruthfulSearch(plan)
    assert number_of_best(search, "max") is None
    for trial_id, values in {"a": [0.9], "b": [0.1, 0.2, 0.3], "c": [0.1, 0.2, 0.5], "d": [0.1, 0.2, 0.5]}.items():
        search.suggest(trial_id)
        search.on_trial_complete(trial_id, report(search, trial_id, *values))
        if trial_id == "a":
            assert number_of_best(search, "max") == 0, "nothing else there is"
    assert number_of_best(search, "max") == 2
    assert number_of_best(search, "min") == 1


def number_of_best(search: TruthfulSearch, mode: str) -> int | None:
    return next((trial.number for trial in ranked(search.study, mode)), None)
