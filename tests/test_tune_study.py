"""Real studies on a real cluster: from the first suggestion to the test fold, through kills and back."""

import csv
import itertools
import json
import logging
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import ray
import torch
import yaml
from mlflow.entities import Run
from mlflow_points import points_of
from sqlalchemy import Engine
from sqlalchemy.event import listen, remove
from tiny import TINY

from meamtm.config import from_flat, load, run_folder
from meamtm.data.pack import pack
from meamtm.errors import CheckpointError, ConfigError, TooLargeError
from meamtm.tracking import read_rows
from meamtm.tracking.server import connect
from meamtm.training import memory
from meamtm.training.memory import LIBRARIES_BYTES, check_memory, needed_bytes
from meamtm.training.run import absolute, finished
from tune.__main__ import main
from tune.driver import count_at_once, run_trials
from tune.history import open_study, point_of, trained
from tune.interrupt import interruptible, stop_asked
from tune.plan import Plan, load_plan
from tune.result import Result, read_result
from tune.runs import is_recorded, run_folder_of
from tune.study import run_study, search_and_finalists

# Ray Data, which Ray Train sets up beside every run, builds its own defaults in a way that it calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")
ROOT = Path(__file__).parents[1]
SPACE = {"optim.lr": {"log_uniform": [1e-4, 1e-2]}, "encoder.depth": {"int": [1, 2]}}


@pytest.fixture(scope="module")
def cluster():
    """Two CPUs for all studies of this module that run in this process."""
    mine = not ray.is_initialized()
    if mine:
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield
    if mine:
        ray.shutdown()


@pytest.fixture
def study(tmp_path: Path, packed: Path, cache_dir: Path, migrated: Path) -> Path:
    """A study file of this test's own."""
    return write_study(tmp_path, packed, cache_dir, migrated)


def write_study(folder: Path, packed: Path, cache_dir: Path, migrated: Path) -> Path:
    """Writes a study of four trials of four epochs, everything of which lies in one folder, MLflow's store included."""
    shutil.copyfile(migrated, folder / "mlflow.db")
    places = {
        "data.path": str(packed),
        "data.cache_dir": str(cache_dir),
        "data.valid_fold": 2,
        "runs_dir": str(folder / "runs"),
        "tracking.mlflow": True,
        "tracking.uri": f"sqlite:///{folder}/mlflow.db",
    }
    settings = {
        "name": "tiny",
        "studies_dir": str(folder / "studies"),
        "set": {key: value for key, value in {**TINY, **places}.items() if key not in SPACE},
        "space": SPACE,
        "trials": 4,
        "asha": {"grace_epochs": 1, "reduction": 2},
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


class Finished(NamedTuple):
    """A study that ran: its file, its plan, what it found first and in the end, and what it said."""

    path: Path
    plan: Plan
    first: Result
    result: Result
    lines: list[str]


def states(plan: Plan) -> Counter[str]:
    return Counter(trial.state.name for trial in open_study(plan).trials)


def recorded(plan: Plan) -> dict[str, list[Run]]:
    """MLflow's runs by the name of their parent, "" for those without."""
    client = connect(str(plan.base.tracking.uri))
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    names = {run.info.run_id: str(run.info.run_name) for run in runs}
    below: dict[str, list[Run]] = {}
    for run in runs:
        below.setdefault(names.get(run.data.tags.get("mlflow.parentRunId", ""), ""), []).append(run)
    return below


def command(study: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tune", str(study), *words],
        cwd=ROOT,
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(process: subprocess.Popen[str], text: str) -> str:
    """Reads a process's output up to a line with a text; fails with all of it where that never comes."""
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if text in line:
            return said
    pytest.fail(f"{text!r} was never said:\n{said}")


def call(words: list[str]) -> None:
    """Runs the command in this process."""
    before, sys.argv = sys.argv, ["tune", *words]
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise
    finally:
        sys.argv = before


@pytest.fixture(scope="module")
def finished_study(cluster, tmp_path_factory, packed, cache_dir, migrated) -> Finished:
    """A study of two trials that was then asked for four; its tests only look."""
    path = write_study(tmp_path_factory.mktemp("finished"), packed, cache_dir, migrated)
    lines: list[str] = []
    first = run_study(load_plan(path, ["trials=2"]), lines.append)
    plan = load_plan(path)
    return Finished(path, plan, first, run_study(plan, lines.append), lines)


@pytest.mark.ray
def test_more_trials_continue_the_same_study(finished_study):
    first, result = finished_study.first, finished_study.result
    assert result.study == first.study
    assert result.rows[:2] == first.rows
    assert len(result.rows) == 4
    assert len({row.point["optim.lr"] for row in result.rows}) == 4
    assert sum(re.match(r" +\d/[24]  trial \d", line) is not None for line in finished_study.lines) == 4


@pytest.mark.ray
@pytest.mark.parametrize("words", [[], ["trials=6"]], ids=["its result", "more trials"])
def test_trials_on_other_data_of_the_same_name_are_another_study(finished_study, sounds, packed, tmp_path, words):
    """As when a wrong label was corrected, and the set packed again."""
    lines = [line for line in (sounds / "synth.csv").read_text().splitlines() if not line.startswith("5-")]
    (tmp_path / "corrected.csv").write_text("\n".join(lines))
    pack(sounds, tmp_path / packed.name, tmp_path / "corrected.csv")
    plan = load_plan(finished_study.path, [f"data.path={tmp_path / packed.name}", *words])
    assert plan.folder == finished_study.plan.folder
    with pytest.raises(
        CheckpointError, match=r"its trials were trained on other data than .*set another name, or remove"
    ):
        run_study(plan, pytest.fail)


@pytest.mark.ray
def test_optuna_holds_the_truth_about_every_trial(finished_study):
    trials = open_study(finished_study.plan).trials
    assert len(trials) == 4
    for trial in trials:
        epochs = sorted(trial.intermediate_values)
        assert epochs == list(range(1, len(epochs) + 1))
        assert trial.state.name == ("COMPLETE" if len(epochs) == 4 else "PRUNED")
        assert trial.value == trial.intermediate_values[epochs[-1]]
        assert {"ray_trial_id", "mlflow_run_id", "signature"} <= trial.user_attrs.keys()
    assert any(trial.state.name == "COMPLETE" for trial in trials)


@pytest.mark.ray
def test_mlflow_shows_the_study_and_a_run_below_it_for_each_trial(finished_study):
    plan, trials = finished_study.plan, open_study(finished_study.plan).trials
    below = recorded(plan)
    assert sorted(str(run.info.run_name) for run in below[plan.name]) == [f"trial-000{number}" for number in range(4)]
    assert {run.info.status for runs in below.values() for run in runs} == {"FINISHED"}
    for run in below[plan.name]:
        trial = trials[int(run.data.tags["optuna.trial"])]
        assert trial.user_attrs["mlflow_run_id"] == run.info.run_id
        assert run.data.tags["outcome"] == {"COMPLETE": "complete", "PRUNED": "pruned"}[trial.state.name]
        assert float(run.data.params["optim.lr"]) == trial.params["optim.lr"]
        history = connect(str(plan.base.tracking.uri)).get_metric_history(run.info.run_id, "valid/accuracy")
        assert {point.step: point.value for point in history} == trial.intermediate_values


@pytest.mark.ray
def test_meamtm_train_takes_best_yaml_as_it_is_and_finds_its_run_done(finished_study):
    plan, result = finished_study.plan, finished_study.result
    best = absolute(load(plan.folder / "best.yaml"))
    assert best.data.valid_fold is None
    assert run_folder(best) == Path(result.run_folder)
    again = finished(best)
    assert again is not None
    assert again.evaluation is not None
    assert again.evaluation.metrics == result.test
    complete = [row.value for row in result.rows if row.state == "COMPLETE"]
    assert result.best_row.value == max(value for value in complete if value is not None)


@pytest.mark.ray
def test_a_finished_study_is_not_run_again_and_reports_itself(finished_study, capsys):
    plan = finished_study.plan
    assert run_study(plan, pytest.fail) == finished_study.result == read_result(plan)
    call(["report", str(finished_study.path)])
    assert "importances" in capsys.readouterr().out
    names = {path.name for path in (plan.folder / "report").iterdir()}
    assert {"trials.csv", "history.png", "parallel.png", "slice-optim.lr.png", "slice-encoder.depth.png"} <= names
    assert "sensitivity.png" in names
    complete = sum(row.state == "COMPLETE" for row in finished_study.result.rows)
    assert ("interactive.html" in names) == (complete > 1)
    with (plan.folder / "report" / "trials.csv").open() as file:
        assert [row["trial"] for row in csv.DictReader(file)] == ["0", "1", "2", "3"]


@pytest.mark.ray
def test_a_finished_study_that_was_moved_names_the_places_where_it_is(finished_study, tmp_path, request):
    plan, result = finished_study.plan, finished_study.result
    for place, name in ((plan.config.studies_dir, "studies"), (plan.base.runs_dir, "runs")):
        shutil.copytree(place, tmp_path / name)
        Path(place).rename(f"{place}-away")
        request.addfinalizer(lambda place=place: Path(f"{place}-away").rename(place))
    words = [f"studies_dir={tmp_path / 'studies'}", f"runs_dir={tmp_path / 'runs'}", "tracking.mlflow=false"]
    moved = load_plan(finished_study.path, words)
    told: list[str] = []
    found = run_study(moved, told.append)
    assert not any("train/loss" in line for line in told), "nothing is trained again"
    assert Path(found.folder) == moved.folder == tmp_path / "studies" / plan.name
    assert Path(found.checkpoint) == tmp_path / "runs" / Path(result.run_folder).name / Path(result.checkpoint).name
    assert (found.rows, found.test) == (result.rows, result.test)
    assert run_study(moved, pytest.fail) == found


@pytest.mark.ray
@pytest.mark.timeout(900)
@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.soak)])
def test_trials_and_the_best_run_train_on_ray_workers(cluster, study, workers):
    """Two folds one after the other, each a Ray Train run of its own."""
    words = ["trials=1", "train.epochs=2", f"scale.workers={workers}", "data.valid_fold=null", "inner_folds=[2,3]"]
    plan = load_plan(study, words)
    result = run_study(plan, lambda _: None)
    (trial,) = open_study(plan).trials
    assert trial.state.name == "COMPLETE"
    assert sorted(trial.intermediate_values) == [1, 2, 3, 4]
    runs = [absolute(run) for run in plan.runs(plan.trial(0, point_of(trial)))]
    checkpoint = Path(trial.user_attrs["checkpoint"])
    assert (checkpoint.parent, checkpoint.name) == (run_folder(runs[1]), "epoch-00002")
    first, second = ([row["valid/accuracy"] for row in read_rows(run_folder(run) / "metrics.jsonl")] for run in runs)
    told = [*first, *((first[-1] + value) / 2 for value in second)]
    assert [trial.intermediate_values[epoch] for epoch in (1, 2, 3, 4)] == pytest.approx(told)
    assert len(trial.user_attrs["hits"]) == 40
    assert {run.info.status for runs in recorded(plan).values() for run in runs} == {"FINISHED"}
    assert result.test is not None


@pytest.mark.ray
def test_failed_trials_are_failures_everywhere_and_end_the_study(cluster, study):
    settings = yaml.safe_load(study.read_text())
    settings["space"]["optim.name"] = {"choice": ["adamv", "lamp"]}
    study.write_text(yaml.safe_dump(settings))
    plan = load_plan(study, ["max_failed_trials=1"])
    with pytest.raises(ConfigError, match=r"max_failed_trials=1: 2 trials have failed.*optim.name"):
        run_study(plan, lambda _: None)
    assert states(plan)["FAIL"] == 2
    assert states(plan).keys() <= {"FAIL", "WAITING"}
    below = recorded(plan)
    failures = [run for run in below[plan.name] if run.info.status == "FAILED"]
    assert len(failures) == 2
    assert all("optim.name" in run.data.tags["error"] for run in failures)
    assert {run.info.status for run in below[plan.name]} <= {"FAILED", "KILLED"}
    assert [run.info.status for run in below[""]] == ["FAILED"]


@pytest.mark.ray
def test_a_study_outlives_a_trial_that_diverges_and_replaces_one_that_does_not_fit_into_memory(cluster, study):
    settings = yaml.safe_load(study.read_text())
    good, large = {"encoder.heads": 2, "encoder.head_dim": 8}, {"encoder.heads": 64, "encoder.head_dim": 256}
    settings["space"] = {key: {"choice": [good[key], large[key]]} for key in good}
    settings["space"]["optim.lr"] = {"choice": [1e-3, 10.0]}
    settings["start"] = [good | {"optim.lr": 10.0}, large | {"optim.lr": 1e-3}, good | {"optim.lr": 1e-3}]
    settings["set"] = {key: value for key, value in settings["set"].items() if key not in settings["space"]}
    settings["set"] |= {"optim.name": "sgd", "optim.weight_decay": 1.0, "optim.clip_grad": 0, "train.batch_size": 5}
    settings["set"] |= {"encoder.depth": 8}
    study.write_text(yaml.safe_dump(settings | {"trials": 3, "max_failed_trials": 1, "asha": {"enabled": False}}))
    plan, lines = load_plan(study, ["max_concurrent=1"]), []
    run_study(plan, lines.append)
    ended = open_study(plan).trials
    assert [trial.state.name for trial in ended[:3]] == ["FAIL", "PRUNED", "COMPLETE"]
    assert len(trained(open_study(plan))) == 3
    assert any(re.search(r"1/3  trial 1 +rejected .* GB at training's peak", line) for line in lines), lines
    below = {str(run.info.run_name): run for run in recorded(plan)[plan.name]}
    reasons = [below[f"trial-000{number}"].data.tags["error"] for number in (0, 1)]
    assert re.match(r"train/loss is (nan|inf) at step \d+ of epoch \d; lower optim\.lr \(10\)", reasons[0]), reasons[0]
    assert re.search(r"takes [\d,.]+ GB at training's peak, and there are", reasons[1]), reasons[1]
    assert [below[f"trial-000{number}"].info.status for number in range(3)] == ["FAILED", "FAILED", "FINISHED"]


@pytest.mark.ray
def test_memory_says_how_many_trials_train_at_once_and_how_large_they_may_be(cluster, study):
    """Two that need two thirds of it each train one after the other, and told to train at once, not at all."""
    there = ray.cluster_resources()["memory"]
    assert count_at_once(load_plan(study)) == 2
    words = ["space.encoder.depth=null", "encoder.heads=64", "encoder.head_dim=64", "start=[{optim.lr: 1.0e-3}]"]
    for depth in itertools.count(1):
        plan = load_plan(study, [*words, f"encoder.depth={depth}"])
        if (needed := needed_bytes(plan.base)) > 0.6 * there:
            break
    assert count_at_once(plan) == 1
    limit = int(needed / 0.9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "memory_limit_bytes", lambda _: limit)
        check_memory(plan.base, torch.device("cpu"))
        with pytest.raises(TooLargeError, match=r"GB for each of 2; train fewer at once") as refused:
            check_memory(plan.base, torch.device("cpu"), 2)
    assert refused.value.excess == pytest.approx(needed / (limit // 2 - LIBRARIES_BYTES) - 1)
    assert pickle.loads(pickle.dumps(refused.value)).excess == refused.value.excess  # noqa: S301 (a worker's arrives)


@pytest.mark.ray
def test_a_trial_whose_process_is_killed_fails_and_the_study_goes_on(cluster, study, tmp_path):
    """As the kernel does it to who takes too much memory."""
    settings = yaml.safe_load(study.read_text()) | {"trials": 3, "max_concurrent": 1, "asha": {"enabled": False}}
    settings["set"] |= {"train.epochs": 40, "scale.max_failures": 0}
    study.write_text(yaml.safe_dump(settings))
    plan, lines = load_plan(study), []

    def kill_the_first() -> None:
        deadline_s = time.monotonic() + 120
        while not (begun := list(tmp_path.glob("**/*trial-0000*/metrics.jsonl"))):
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        os.kill(json.loads((begun[0].parent / ".holder.json").read_text())["pid"], signal.SIGKILL)

    with ThreadPoolExecutor(1) as beside:
        killer = beside.submit(kill_the_first)
        run_study(plan, lines.append)
        killer.result()
    assert any("failed" in line for line in lines)
    trials = open_study(plan).trials
    assert [trial.state.name for trial in trials] == ["FAIL", "COMPLETE", "COMPLETE"]
    assert trials[0].user_attrs["error"] == "its worker died"
    below = {str(run.info.run_name): run.info.status for run in recorded(plan)[plan.name]}
    assert below == {"trial-0000": "FAILED", "trial-0001": "FINISHED", "trial-0002": "FINISHED"}


@pytest.mark.ray
def test_a_study_ends_when_all_of_its_space_was_tried(cluster, study):
    """Three trials are asked for where there are two points; the same command again finds nothing to do."""
    plan = load_plan(study, ["space.optim.lr=null", "trials=3"])
    lines: list[str] = []
    result = run_study(plan, lines.append)
    assert sorted(row.point["encoder.depth"] for row in result.rows) == [1, 2]
    found_none = "1,000 points drawn at random were all tried or refused before"
    assert f"{plan.name}: {found_none}, so the search ends; widen the space" in lines
    assert run_study(plan, pytest.fail) == result


@pytest.mark.ray
def test_a_time_budget_ends_the_search(cluster, study):
    """Trials without a finished epoch, as on a busy machine, are left to a longer budget."""
    plan = load_plan(study, ["train.epochs=2000", "trials=2", "time_budget_s=10", "asha.enabled=false"])
    plan.write()
    run_trials(plan, None, {}, pytest.fail, 2)  # without the best one's 2000 epochs, which would take minutes
    for trial in open_study(plan).trials:
        assert trial.state.name == ("PRUNED" if trial.intermediate_values else "WAITING")
        assert trial.value == (trial.intermediate_values[trial.last_step or 0] if trial.intermediate_values else None)


def test_a_time_budget_that_is_spent_is_not_spent_again(study):
    """As when finalists are asked for afterwards; another budget would search on."""
    plan = load_plan(study, ["trials=3", "time_budget_s=5"])
    optuna_study = open_study(plan)
    optuna_study.tell(optuna_study.ask(), 0.5)
    optuna_study.set_user_attr("searched", [3, 5.0])
    search_and_finalists(plan, optuna_study, None, {}, pytest.fail)
    for words in (["trials=4", "time_budget_s=5"], ["trials=3", "time_budget_s=6"], ["trials=3"]):
        with pytest.raises(pytest.fail.Exception, match="trials to go"):
            search_and_finalists(load_plan(study, words), optuna_study, None, {}, pytest.fail)


@pytest.mark.ray
def test_a_finished_study_is_sent_to_a_server_that_lacks_it(finished_study, tmp_path):
    """As after an outage; nothing is trained for it, and a second time nothing is sent."""
    source = finished_study.plan
    shutil.copytree(source.folder, tmp_path / "studies" / source.name)
    words = [f"studies_dir={tmp_path}/studies", f"tracking.uri=sqlite:///{tmp_path}/other.db"]
    plan = load_plan(finished_study.path, words)
    told = run_study(plan, pytest.fail)
    assert told.mlflow_uri == plan.base.tracking.uri
    assert told.mlflow_run_id in {run.info.run_id for run in recorded(plan)[""]}
    old = finished_study.result
    assert replace(told, mlflow_uri=old.mlflow_uri, mlflow_run_id=old.mlflow_run_id) == old
    assert run_study(plan, pytest.fail) == told
    first, second = (
        {run.info.run_name: run for runs in recorded(each).values() for run in runs} for each in (source, plan)
    )
    trials = {f"trial-000{number}" for number in range(4)}
    assert second.keys() == {plan.name, Path(finished_study.result.run_folder).name, *trials}
    for name, run in second.items():
        known = first[name]
        assert run.info.status == known.info.status
        assert run.data.tags.get("outcome") == known.data.tags.get("outcome")
        different = {key for key, _ in run.data.params.items() ^ known.data.params.items()}
        assert different <= {"studies_dir", "runs_dir", "tracking.uri", "trials"}
        if name != plan.name:  # whose parent tells of both times that it was asked
            points = [
                points_of(str(each.base.tracking.uri), one.info.run_id) for each, one in ((source, known), (plan, run))
            ]
            assert points[0] == points[1]
    assert is_recorded(plan, finished_study.result)


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_killed_study_is_continued_by_the_same_command(study):
    plan = load_plan(study)
    with command(study) as driver:
        wait_for(driver, "1/4")
        children = psutil.Process(driver.pid).children(recursive=True)
        driver.kill()
    before = open_study(plan).trials
    assert any(trial.state.name == "RUNNING" for trial in before)
    busy = [child for child in children if "Agent" not in child.name()]  # which notice after a while, and idle
    _, alive = psutil.wait_procs(busy, timeout=30)
    assert not alive, "Ray's processes end with the driver that started them"

    driver = command(study)
    said, _ = driver.communicate(timeout=600)
    assert driver.returncode == 0, said
    trials = open_study(plan).trials
    assert states(plan).keys() <= {"COMPLETE", "PRUNED"}
    assert states(plan).total() == 4
    assert [trial.params for trial in trials[: len(before)]] == [trial.params for trial in before]
    for old, new in zip(before, trials, strict=False):
        assert old.intermediate_values.items() <= new.intermediate_values.items()
    below = recorded(plan)
    assert len(below[plan.name]) == 4
    assert {run.info.status for runs in below.values() for run in runs} == {"FINISHED"}

    began_s = time.monotonic()
    third = command(study)
    again, _ = third.communicate()
    assert third.returncode == 0
    assert "to go" not in again
    assert again.splitlines()[-12:] == said.splitlines()[-12:], "the finished study is printed as before"
    assert time.monotonic() - began_s < 30


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_study_that_is_told_to_stop_ends_its_runs_and_can_go_on(study):
    driver = command(study, "train.epochs=500", "asha.enabled=false")
    said = wait_for(driver, "to go")
    plan = load_plan(study, ["train.epochs=500", "asha.enabled=false"])
    deadline_s = time.monotonic() + 300
    while not (plan.folder / "optuna.db").exists() or not any(
        trial.intermediate_values for trial in open_study(plan).trials
    ):
        assert time.monotonic() < deadline_s, said
        time.sleep(0.5)
    began_s = time.monotonic()
    driver.send_signal(signal.SIGTERM)
    rest, _ = driver.communicate()
    assert time.monotonic() - began_s < 10
    assert driver.returncode == 1
    assert rest.strip().splitlines()[-1] == "tune: stopped; the same command continues"
    assert "Traceback" not in rest
    assert states(plan).keys() == {"WAITING"}
    assert {run.info.status for runs in recorded(plan).values() for run in runs} == {"KILLED"}


@pytest.mark.ray
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_ray_starts_is_heard(study, number):
    """There Python swallows an exception, and Ray has a handler of its own."""
    with command(study, "train.epochs=500", "asha.enabled=false", "tracking.mlflow=false") as driver:
        wait_for(driver, "to go")
        time.sleep(0.7)
        driver.send_signal(number)
        rest, _ = driver.communicate(timeout=60)
    assert driver.returncode == 1
    assert rest.strip().splitlines()[-1] == "tune: stopped; the same command continues"
    assert "Traceback" not in rest


@pytest.mark.ray
def test_a_signal_while_the_studys_file_is_written_leaves_it_free(study, cluster):
    plan = load_plan(study, ["train.epochs=500", "asha.enabled=false", "tracking.mlflow=false"])
    written: list[str] = []
    signalled_s: list[float] = []

    def interrupt(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        if statement.startswith("INSERT INTO trial_intermediate_values"):
            written.append(statement)
        elif written and not signalled_s:  # a query, whose answer nobody has read yet
            signalled_s.append(time.monotonic())
            signal.raise_signal(signal.SIGINT)

    listen(Engine, "after_cursor_execute", interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_study(plan, lambda _: None)
    finally:
        remove(Engine, "after_cursor_execute", interrupt)
    assert time.monotonic() - signalled_s[0] < 10
    assert states(plan).keys() == {"WAITING"}


@pytest.mark.parametrize("runs_dir", ["runs", "~/runs", "/mnt/runs"])
def test_a_trials_folder_is_where_its_run_lies(runs_dir):
    run = from_flat({"runs_dir": runs_dir, "tracking.mlflow": False})
    assert run_folder_of(run) == run_folder(absolute(run))


def interrupt_and_clean_up(number: signal.Signals) -> None:
    """Interrupts itself, and is told to stop twice more while it cleans up."""
    with interruptible():
        try:
            signal.raise_signal(number)
        finally:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_interrupt_once(number):
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        interrupt_and_clean_up(number)
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_first_signal_asks_a_run_to_stop(number):
    with interruptible():
        inner = signal.getsignal(number)
        with stop_asked() as should_stop:
            assert not should_stop()
            for _ in range(3):  # a terminal and a job server may both send one
                signal.raise_signal(number)
            assert should_stop()
        assert signal.getsignal(number) == inner


def test_what_an_inner_block_heard_does_not_interrupt_the_end_of_the_outer_one():
    with interruptible():
        with stop_asked() as should_stop:
            signal.raise_signal(signal.SIGINT)
            assert should_stop()
        signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interruptible():
        signal.raise_signal(signal.SIGINT)


def test_a_signal_long_after_the_first_does_not_wait_for_the_run(monkeypatch):
    monkeypatch.setattr("tune.interrupt.DEAF_S", 0.0)
    with stop_asked() as should_stop:
        signal.raise_signal(signal.SIGINT)
        assert should_stop()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.path=/nowhere/at/all"], r"data\.path=.*/nowhere/at/all"),
        (["data.valid_fold=null"], "data.valid_fold=None: a study chooses on an inner validation fold"),
        (["data.valid_fold=9"], "data.valid_fold=9: .* has no such fold"),
        (["tracking.uri=http://127.0.0.1:9"], "tracking.uri=http://127.0.0.1:9 does not answer"),
        (["space.optim.lrr=null"], "space.optim.lrr=null: it is not searched; did you mean space.optim.lr?"),
        (["space.train.seed={int: [1, 3]}"], "space.train.seed: trials that differ in it cannot be compared"),
        (["space={encoder.heads: {int: [1, 2]}}", "encoder.heads=2"], "encoder.heads=2: .* is searched here; to fix"),
        (
            ["scale.address=ray://127.0.0.1:9"],
            "scale.address=ray://...: a study runs on the cluster itself, not through a ",
        ),
        (["trails=3"], "trails=3: no such key of a study or a run; did you mean trials?"),
    ],
)
def test_a_mistake_gets_one_line_and_exit_code_2(study, words, message, capfd):
    with pytest.raises(SystemExit, match="2"):
        call([str(study), *words])
    out, err = capfd.readouterr()
    assert re.search(message, err), err
    assert len(err.strip().splitlines()) == 1
    assert "Traceback" not in out + err


def test_a_cluster_that_does_not_answer_gets_one_line_and_leaves_no_run_open(study):
    driver = command(study, "scale.address=127.0.0.1:9")
    said, _ = driver.communicate(timeout=200)
    assert driver.returncode == 2
    assert "tune: scale.address=127.0.0.1:9: no Ray cluster answers there" in said.splitlines()[-1]
    assert "Traceback" not in said
    assert {run.info.status for runs in recorded(load_plan(study)).values() for run in runs} == {"FAILED"}


def test_resume_wants_something_to_continue(study, capfd):
    with pytest.raises(SystemExit, match="2"):
        call([str(study), "--resume"])
    assert "holds no study to continue; leave --resume out to begin" in capfd.readouterr().err


def test_a_report_of_a_study_that_never_was_says_so(study, capfd):
    with pytest.raises(SystemExit, match="2"):
        call(["report", str(study)])
    assert "no such study yet; start it by python -m tune, with the same words" in capfd.readouterr().err


def test_a_finished_study_is_recognised_without_ray_or_optuna(study):
    plan = load_plan(study, ["tracking.mlflow=false", "time_budget_s=60"])
    plan.write()
    row = {
        "number": 0,
        "state": "COMPLETE",
        "value": 0.5,
        "epochs": 4,
        "elapsed_s": 1.0,
        "point": {"optim.lr": 1e-3},
        "error": None,
    }
    fields = {
        "study": plan.name,
        "folder": str(plan.folder),
        "objective": "valid/accuracy",
        "trials": 4,
        "time_budget_s": 60.0,
    }
    found = {
        "rows": [row],
        "best": 0,
        "run_folder": str(plan.folder),
        "checkpoint": "c",
        "test": {"test/accuracy": 0.4},
    }
    (plan.folder / "result.json").write_text(json.dumps({**fields, **found, "mlflow_uri": None, "mlflow_run_id": None}))
    program = (
        "import sys; from tune.__main__ import main\n"
        f"sys.argv = ['tune', {str(study)!r}, 'tracking.mlflow=false', 'time_budget_s=60']\n"
        "try:\n    main()\n"
        "finally:\n    print(sorted({'ray', 'optuna', 'mlflow', 'torch'} & sys.modules.keys()))"
    )
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "[]"
    assert "test/accuracy" in ran.stdout
    assert "1 of 4 trials ended before time_budget_s=60 was up or nothing new was left to try; with" in ran.stdout


def test_accuracy_is_no_objective_where_clips_have_several_labels(
    sounds: Path, cache_dir: Path, tmp_path: Path, migrated: Path
) -> None:
    with (sounds / "synth.csv").open(encoding="utf-8") as table:
        lines = [f"{row['filename']},{row['category']};any,{row['fold']}\n" for row in csv.DictReader(table)]
    (tmp_path / "list.csv").write_text("path,label,fold\n" + "".join(lines))
    pack(sounds / "audio", tmp_path / "several", tmp_path / "list.csv")
    file = write_study(tmp_path, tmp_path / "several", cache_dir, migrated)
    with pytest.raises(ConfigError, match=r"objective=valid/accuracy: .*; set objective=valid/map or valid/macro_f1"):
        run_study(load_plan(file), lambda _: None)
