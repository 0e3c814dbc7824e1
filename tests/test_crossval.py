"""Every fold tested by models that have not heard it: the plan, the result, what a second call and a stop do."""

import csv
import json
import os
import runpy
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from itertools import count
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

import pytest
from command import meamtm_command
from tiny import tiny

from meamtm.config import flatten, override, run_folder, write_yaml
from meamtm.crossval import CrossValidation, cross_validate, crossval_folder, plan_runs
from meamtm.data.cache import open_clips
from meamtm.data.pack import pack
from meamtm.data.split import split_clips
from meamtm.distributed import run_all
from meamtm.distributed.side_by_side import largest_peak_bytes
from meamtm.errors import BusyError, CheckpointError, ConfigError, DataError, MeamtmError
from meamtm.screen import bar, run_bars
from meamtm.tracking import read_rows
from meamtm.tracking.server import connect
from meamtm.training.context import Stopped
from meamtm.training.lock import held
from meamtm.training.memory import peak_training_bytes
from meamtm.training.notes import is_told_to_stop
from meamtm.training.predictions import read_predictions
from meamtm.training.run import absolute, run_here

if TYPE_CHECKING:
    from ray.actor import ActorHandle

SHORT = {"train.epochs": 2, "train.checkpoint_s": 60}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A cluster of two CPUs on this machine."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.mark.parametrize("keep", ["last", "best"])
def test_each_clip_is_tested_once_per_seed_and_never_heard(
    packed: Path, cache_dir: Path, tmp_path: Path, keep: str
) -> None:
    config = tiny(packed, cache_dir, tmp_path, {"train.keep": keep, "train.seed": 5, "data.valid_fold": 4})
    runs = plan_runs(config, [], 2)
    clips = open_clips(config.data, 8_000)
    for seed in (5, 6):
        splits = [split_clips(clips, run.data) for (_, own), run in runs.items() if own == seed]
        assert sorted(clip for split in splits for clip in split.test.tolist()) == list(range(len(clips)))
        for split in splits:
            assert not set(split.test) & (set(split.train) | set(split.valid))
            assert (len(split.valid) > 0) == (keep == "best")
            assert len(split.train) + len(split.valid) + len(split.test) == len(clips)
    assert len(runs) == len({run_folder(run) for run in runs.values()}) == 10


def test_folds_that_do_not_exist_are_refused(packed: Path, cache_dir: Path, tmp_path: Path) -> None:
    config = tiny(packed, cache_dir, tmp_path)
    with pytest.raises(DataError, match=r"--folds: .* has no fold 9; choose from 1, 2, 3, 4, 5"):
        plan_runs(config, [1, 9], 1)


def test_data_with_a_split_of_its_own_has_nothing_to_cross(sounds: Path, cache_dir: Path, tmp_path: Path) -> None:
    files = sorted((sounds / "audio").glob("*.wav"))
    lines = [f"audio/{file.name},{i % 2},{('train', 'valid', 'test')[i % 3]}" for i, file in enumerate(files)]
    manifest = tmp_path / "list.csv"
    manifest.write_text("\n".join(["path,label,split", *lines]))
    pack(sounds, tmp_path / "set", manifest)
    with pytest.raises(DataError, match="has its own split; `meamtm train` tests on that"):
        plan_runs(tiny(tmp_path / "set", cache_dir, tmp_path), [], 1)


def test_a_class_that_lies_in_one_fold_alone_is_told_before_anything_trains(
    sounds: Path, cache_dir: Path, tmp_path: Path
) -> None:
    files = sorted((sounds / "audio").glob("*.wav"))[:25]
    labels = ["rare" if number % 5 == 4 else "owl" if number % 2 else "cat" for number in range(25)]
    lines = [
        f"audio/{file.name},{label},{number % 5 + 1}"
        for number, (file, label) in enumerate(zip(files, labels, strict=True))
    ]
    (tmp_path / "list.csv").write_text("\n".join(["path,label,fold", *lines]))
    pack(sounds, tmp_path / "set", tmp_path / "list.csv")
    config = tiny(tmp_path / "set", cache_dir, tmp_path / "runs")
    with pytest.raises(DataError, match=r"no training clip has the class rare \(data\.test_fold=5, "):
        plan_runs(config, [], 1)
    assert len(plan_runs(config, [1, 2], 1)) == 2


def test_what_was_found_on_other_data_of_the_same_name_is_not_told_again(
    sounds: Path, packed: Path, cache_dir: Path, tmp_path: Path
) -> None:
    """As when a wrong label was corrected, and the set packed again."""
    config = tiny(packed, cache_dir, tmp_path / "runs", {**SHORT, "train.epochs": 1})
    for fold in (1, 2):
        run_here(override(config, {"data.test_fold": fold}))
    cross_validate(config, folds=[1, 2])
    lines = [line for line in (sounds / "synth.csv").read_text().splitlines() if not line.startswith("5-")]
    (tmp_path / "corrected.csv").write_text("\n".join(lines))
    pack(sounds, tmp_path / packed.name, tmp_path / "corrected.csv")
    (crossval_folder(config, [1, 2]) / "predictions.csv").unlink()  # as a version had it that did not write them
    assert len(cross_validate(config, folds=[1, 2]).predictions()) == 40
    again = override(config, {"data.path": str(tmp_path / packed.name)})
    assert crossval_folder(again, [1, 2]) == crossval_folder(config, [1, 2])
    with pytest.raises(
        CheckpointError, match=r"was found on other data than .*; set another name, or remove that fold"
    ):
        cross_validate(again, folds=[1, 2])
    summary = crossval_folder(config, [1, 2]) / "crossval.json"
    summary.write_text(summary.read_text().replace('"digest":', '"unknown":'))  # as that version had it
    with pytest.raises(CheckpointError, match="was found on other data than"):
        cross_validate(again, folds=[1, 2])


@pytest.mark.ray
def test_runs_side_by_side_find_what_each_finds_alone(
    cluster: None, packed: Path, cache_dir: Path, tmp_path: Path
) -> None:
    tracking = {"tracking.mlflow": True, "tracking.uri": f"sqlite:///{tmp_path}/mlflow.db"}
    config = tiny(packed, cache_dir, tmp_path / "runs", {**SHORT, **tracking})
    heard: list[tuple[int, int]] = []
    result = cross_validate(config, folds=[1, 3], num_seeds=2, heard=lambda run, _, step: heard.append((run, step)))
    assert sorted(heard) == [(run, step) for run in range(4) for step in (1, 2)]
    assert [(row.fold, row.seed) for row in result.rows] == [(1, 0), (3, 0), (1, 1), (3, 1)]

    alone = override(config, {"runs_dir": str(tmp_path / "alone"), "data.test_fold": 3, "train.seed": 1})
    evaluation = run_here(alone).evaluation
    assert evaluation is not None
    assert result.rows[3].metrics == pytest.approx(evaluation.metrics, abs=1e-6)

    values = [row.metrics["test/accuracy"] for row in result.rows]
    figures = result.figures()
    assert figures["crossval/accuracy_mean"] == pytest.approx(statistics.mean(values))
    assert figures["crossval/accuracy_std"] == pytest.approx(statistics.stdev(values))
    means = [(values[0] + values[1]) / 2, (values[2] + values[3]) / 2]
    assert figures["crossval/accuracy_std_of_seeds"] == pytest.approx(statistics.stdev(means))
    assert figures["crossval/ensemble_accuracy"] == pytest.approx(
        statistics.mean(each.named == each.label for each in result.predictions())
    ), "folds of one size"
    assert result.confusion is not None
    assert sum(map(sum, result.confusion)) == 4 * 20

    folder = crossval_folder(config, [1, 3], 2)
    written = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    tables = {"config.yaml", "crossval.json", "mlflow.json", "per_class.csv", "predictions.csv"}
    assert written == {*tables, "confusion.png", "folds.png"}
    heard_of = result.predictions()
    assert len({each.clip for each in heard_of}) == 40, "of each clip of both folds a line"
    assert {(each.part, each.num_models) for each in heard_of} == {("fold 1", 2), ("fold 3", 2)}
    assert sum(each.num_right for each in heard_of) == sum(row[label] for label, row in enumerate(result.confusion))
    assert json.loads((folder / "crossval.json").read_text())["figures"] == figures
    _check_mlflow(tmp_path, figures)


def _check_mlflow(folder: Path, figures: dict[str, float]) -> None:
    client = connect(f"sqlite:///{folder}/mlflow.db")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    parents = [run for run in runs if "-crossval-" in str(run.info.run_name)]
    assert len(parents) == 1
    assert "predictions.csv" in {file.path for file in client.list_artifacts(parents[0].info.run_id)}
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert {key: parents[0].data.metrics[key] for key in figures} == pytest.approx(figures)
    below = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parents[0].info.run_id]
    assert len(below) == 4


@pytest.mark.ray
def test_what_is_there_is_not_trained_again(cluster: None, packed: Path, cache_dir: Path, tmp_path: Path) -> None:
    config = tiny(packed, cache_dir, tmp_path, SHORT)
    first = cross_validate(config, folds=[1, 2])
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.jsonl")}
    assert cross_validate(config, folds=[1, 2]) == first
    more = cross_validate(config, folds=[1, 2, 3])
    assert cross_validate(config, folds=[1, 2]) == first, "what was found of more folds does not replace it"
    assert json.loads((Path(more.folder) / "crossval.json").read_text())["rows"] == [asdict(row) for row in more.rows]
    assert more.rows[:2] == first.rows
    assert {path: path.stat().st_mtime_ns for path in times} == times


@pytest.mark.ray
def test_a_stop_saves_every_run_and_the_same_call_continues(
    cluster: None, packed: Path, cache_dir: Path, tmp_path: Path
) -> None:
    config = tiny(packed, cache_dir, tmp_path / "whole", {"train.epochs": 30, "train.checkpoint_s": 60})
    whole = cross_validate(config, folds=[1, 2, 3])
    config = override(config, {"runs_dir": str(tmp_path / "parted")})
    asked = count()
    begun = lambda: any(tmp_path.glob("parted/*/metrics.jsonl")) and next(asked) > 1  # noqa: E731
    with pytest.raises(Stopped, match="the same command continues"):
        cross_validate(config, folds=[1, 2, 3], should_stop=begun)
    assert not any(tmp_path.glob("parted/*/.stop"))
    rows = [len(read_rows(path)) for path in tmp_path.glob("parted/*/metrics.jsonl")]
    assert min(rows, default=0) < 30
    assert len(list((tmp_path / "parted").iterdir())) == 2, "the third, for which there was no room, does not begin"
    parted = cross_validate(config, folds=[1, 2, 3])
    assert [row.metrics for row in parted.rows] == [row.metrics for row in whole.rows]


@pytest.mark.ray
def test_a_run_that_another_process_is_at_work_on_is_refused_and_not_stopped(
    cluster: None, packed: Path, cache_dir: Path, tmp_path: Path
) -> None:
    config = tiny(packed, cache_dir, tmp_path, {"train.epochs": 30})
    folder = run_folder(absolute(override(config, {"data.test_fold": 2})))
    ended, seen = Event(), []

    def look() -> None:
        while not ended.wait(0.001):
            seen.append(is_told_to_stop(folder))

    with held(folder), ThreadPoolExecutor(1) as beside:
        beside.submit(look)
        try:
            with pytest.raises(BusyError, match="is at work on it"):
                cross_validate(config, folds=[1, 2])
        finally:
            ended.set()
    assert len(seen) > 10
    assert not any(seen)


@pytest.mark.ray
@pytest.mark.parametrize("is_named", [False, True])
def test_one_run_alone_trains_on_the_cluster_that_is_named(  # noqa: PLR0917
    cluster: None, packed: Path, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_named: bool
) -> None:
    """As a study's last run does: a job's own process is on the head node, where no GPU may be.

    What a run reports elsewhere is looked for now and then, so that one goes on for seconds."""
    import ray

    if is_named:
        monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    config = tiny(packed, cache_dir, tmp_path, {"train.epochs": 150 if is_named else 3})
    holders = set()

    def look(_number: int, _metrics: object, _step: int) -> None:
        with suppress(OSError):  # it has ended
            holders.add(json.loads((run_folder(config) / ".holder.json").read_text())["pid"])

    (outcome,) = run_all([config], look)
    assert outcome.evaluation is not None
    assert len(holders) == 1
    assert (holders != {os.getpid()}) == is_named


def hold(num_cpus: int) -> "ActorHandle":
    """Takes CPUs of the cluster until it is killed."""
    import ray

    @ray.remote(num_cpus=num_cpus)
    class Holder:
        def is_there(self) -> bool:
            return True

    holder = Holder.remote()
    assert ray.get(holder.is_there.remote())
    return holder


@pytest.mark.ray
def test_a_run_does_not_wait_for_what_its_own_job_holds(
    cluster: None, packed: Path, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An entry point that reserves a CPU keeps it until its last run has ended."""
    import ray

    entry_point = hold(num_cpus=1)
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    monkeypatch.setenv("MEAMTM_JOB_CPUS", "1")
    (outcome,) = run_all([tiny(packed, cache_dir, tmp_path, SHORT)])
    assert outcome.evaluation is not None
    with pytest.raises(ConfigError, match=r"scale\.cpus_per_worker=2 needs 2 CPU, and the cluster has 1"):
        run_all([tiny(packed, cache_dir, tmp_path, {**SHORT, "scale.cpus_per_worker": 2, "train.seed": 1})])
    ray.kill(entry_point)


@pytest.mark.ray
def test_runs_that_wait_for_room_can_be_stopped(
    cluster: None, packed: Path, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    other = hold(num_cpus=2)
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    began_s = time.monotonic()
    with pytest.raises(Stopped, match="stopped; the same command continues"):
        run_all(
            [tiny(packed, cache_dir, tmp_path, {**SHORT, "train.seed": seed}) for seed in (1, 2)],
            should_stop=lambda: time.monotonic() > began_s + 3,
        )
    assert time.monotonic() - began_s < 20
    ray.kill(other)


@pytest.mark.ray
def test_the_mistake_of_a_run_is_told_as_it_is(cluster: None, packed: Path, cache_dir: Path, tmp_path: Path) -> None:
    steep = {"optim.name": "sgd", "optim.lr": 10, "optim.clip_grad": 0, "optim.schedule": "constant", "optim.warmup": 0}
    patches = {"encoder.stem": "patch", "encoder.patch": [8, 8], "encoder.stride": [8, 8]}
    config = tiny(packed, cache_dir, tmp_path, {**steep, **patches, "train.epochs": 60})
    with pytest.raises(MeamtmError, match=r"^train/loss is (nan|inf) at step \d of epoch \d+; lower optim.lr"):
        cross_validate(config, folds=[1, 2])
    assert not any(tmp_path.glob("*/.stop"))


def test_the_command_prints_the_table_and_is_quick_when_it_is_done(
    packed: Path, cache_dir: Path, tmp_path: Path
) -> None:
    config = tiny(packed, cache_dir, tmp_path / "runs", {**SHORT, "scale.workers": 0})
    write_yaml(tmp_path / "run.yaml", flatten(config))
    for fold in (1, 2):
        run_here(override(config, {"data.test_fold": fold}))
    shown = meamtm_command("crossval", tmp_path / "run.yaml", "--folds", "1,2")
    assert shown.code == 0, shown.err
    result = json.loads((crossval_folder(config, [1, 2]) / "crossval.json").read_text())
    mean = result["figures"]["crossval/accuracy_mean"]
    assert f"test accuracy {mean:.4f} ± " in shown.out
    assert "over 2 runs" in shown.out
    missed = sum(each.num_right == 0 for each in read_predictions(crossval_folder(config, [1, 2]) / "predictions.csv"))
    assert f"{missed} of 40 clips that no model named right" in shown.out
    began_s = time.monotonic()
    assert meamtm_command("crossval", tmp_path / "run.yaml", "--folds", "1,2").out == shown.out
    assert time.monotonic() - began_s < 2
    assert "ensemble" not in shown.out, "of one seed"
    for fold in (1, 2):
        run_here(override(config, {"data.test_fold": fold, "train.seed": 1}))
    shown = meamtm_command("crossval", tmp_path / "run.yaml", "--folds", "1,2", "--seeds", 2)
    figures = json.loads((crossval_folder(config, [1, 2], 2) / "crossval.json").read_text())["figures"]
    assert f"ensemble of each fold's 2 seeds: accuracy {figures['crossval/ensemble_accuracy']:.4f}\n" in shown.out
    began_s = time.monotonic()
    assert meamtm_command("crossval", tmp_path / "run.yaml", "--folds", "1,2", "--seeds", 2).out == shown.out
    assert time.monotonic() - began_s < 2
    wrong = meamtm_command("crossval", tmp_path / "run.yaml", "--folds", "one")
    assert (wrong.code, wrong.err) == (2, "meamtm: --folds=one: not whole numbers; write them as 1,2\n")


@pytest.mark.ray
def test_configs_are_compared_clip_by_clip(
    cluster: None, packed: Path, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the benchmark that ablations are made with: all runs side by side, and more rows by the same command."""
    compare = runpy.run_path(str(Path(__file__).parent.parent / "benchmarks" / "compare.py"))
    config = tiny(packed, cache_dir, tmp_path / "runs", SHORT)
    write_yaml(tmp_path / "run.yaml", flatten(config))

    def table(*without: str) -> list[dict[str, str]]:
        words = [str(tmp_path / "run.yaml"), "--folds", "1,2", "--out", str(tmp_path / "out.csv"), "--ablate", *without]
        monkeypatch.setattr(sys, "argv", ["compare.py", *words])
        compare["main"]()
        with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    rows = table("mixing")
    assert [row["config"] for row in table("mixing", "stem")] == [*(row["config"] for row in rows), "without stem"]
    whole, unmixed = (
        cross_validate(each, folds=[1, 2]) for each in (config, override(config, {"mix.kind": "none"}))
    )  # which are there already
    for row, result in zip(rows, (whole, unmixed), strict=True):
        assert row["mean %"] == f"{100 * statistics.fmean(result.values()):.2f}"
    right = [{each.clip: each.num_right for each in result.predictions()} for result in (whole, unmixed)]
    differences = [right[1][clip] - right[0][clip] for clip in right[0]]
    assert len(differences) == 40
    assert (rows[1]["won"], rows[1]["lost"]) == (str(differences.count(1)), str(differences.count(-1)))
    assert float(rows[1]["points"]) == pytest.approx(100 * sum(differences) / 40)


def test_runs_of_different_lengths_have_bars_of_their_own(
    packed: Path, cache_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(packed, cache_dir, tmp_path)
    runs = {str(epochs): override(config, {"train.epochs": epochs}) for epochs in (2, 40)}
    with bar() as progress:
        heard = run_bars(progress, runs)
        for number, step in ((0, 1), (0, 2), (1, 2), (1, 4), (1, 40)):
            heard(number, {"train/loss": 1.0}, step)
    lines = [line.partition("  ")[0] for line in capsys.readouterr().err.splitlines()]
    assert lines == ["2: epoch 1/2", "2: epoch 2/2", "40: epoch 4/40", "40: epoch 40/40"]


def test_the_memory_of_the_largest_run_is_reserved(packed: Path, cache_dir: Path, tmp_path: Path) -> None:
    config = tiny(packed, cache_dir, tmp_path)
    seeds = [override(config, {"train.seed": seed}) for seed in (0, 1)]
    wide = override(config, {"encoder.stem_channels": [64, 128], "train.batch_size": 16})
    peaks = {each.train.batch_size: peak_training_bytes(each, 10) for each in (config, wide)}
    assert largest_peak_bytes([*seeds, wide]) == max(peaks.values()) == peaks[16]
    assert largest_peak_bytes(seeds) == peaks[20]


@pytest.mark.ray
def test_sigterm_to_the_command_ends_all_runs_as_killed(packed: Path, cache_dir: Path, tmp_path: Path) -> None:
    tracking = {"tracking.mlflow": True, "tracking.uri": f"sqlite:///{tmp_path}/mlflow.db"}
    config = tiny(packed, cache_dir, tmp_path / "runs", {"train.epochs": 3000, "train.checkpoint_s": 60, **tracking})
    write_yaml(tmp_path / "run.yaml", flatten(config))
    words = [sys.executable, "-m", "meamtm.cli", "crossval", str(tmp_path / "run.yaml"), "--folds", "1,2"]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    deadline_s = time.monotonic() + 120
    while len([path for path in tmp_path.glob("runs/*/metrics.jsonl") if path.stat().st_size]) < 2:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline_s
        time.sleep(0.2)
    began_s = time.monotonic()
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate()
    assert time.monotonic() - began_s < 10
    assert process.returncode == 1
    assert "the same command continues" in said.splitlines()[-1]
    client = connect(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert [run.info.status for run in runs] == ["KILLED", "KILLED"]
    assert len(list(tmp_path.glob("runs/*/epoch-*"))) >= 2


def test_the_figures_of_one_run_have_no_deviation() -> None:
    from meamtm.crossval import FoldRow

    one = CrossValidation("x", ("a", "b"), (FoldRow(1, 0, "r", {"test/accuracy": 0.5}),), [[1, 0], [0, 1]])
    assert one.figures() == {
        "crossval/accuracy_mean": 0.5,
        "crossval/accuracy_std": 0.0,
        "crossval/accuracy_std_of_seeds": 0.0,
    }
