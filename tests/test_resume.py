"""A run that is killed and continued equals one that was never interrupted, bit for bit."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import Record, local, tiny

from meamtm.config import flatten, run_folder, write_yaml
from meamtm.tracking import read_rows
from meamtm.training.checkpoint import load_state, newest
from meamtm.training.context import Stopped
from meamtm.training.notes import leave_report
from meamtm.training.run import absolute, run_here
from meamtm.training.train import train
from tune.trial import run_trial

CHANGES = {
    "data.valid_fold": 2,
    "augment.noise_db": 10.0,
    "encoder.patchout": 0.2,
    "encoder.dropout": 0.1,
    "train.keep": "best",
}
"""All that is random is on, and so is what remembers an earlier epoch."""
PRETRAINED = {**CHANGES, "pretrain.epochs": 2, "train.epochs": 2}


def assert_equal(first: Path, second: Path) -> None:
    """Compares kept weights, those in training, averages and moments of two checkpoints bit for bit."""
    for name, tensor in load_file(first / "model.safetensors").items():
        assert torch.equal(tensor, load_file(second / "model.safetensors")[name]), name
    states = load_state(first), load_state(second)
    for kind in ("model", "ema"):
        for name, tensor in states[0][kind].items():
            assert torch.equal(tensor, states[1][kind][name]), name
    assert states[0].get("best") == states[1].get("best")
    for index, moments in states[0]["optimizer"]["state"].items():
        for name, value in moments.items():
            assert torch.equal(value, states[1]["optimizer"]["state"][index][name]), (index, name)


def science(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """What a run measured, without its times."""
    return [{key: value for key, value in row.items() if not key.startswith("time")} for row in rows]


@pytest.mark.parametrize("changes", [CHANGES, PRETRAINED], ids=["labels", "patches first"])
@pytest.mark.parametrize("stop_after", [3, 8, 10], ids=["mid-epoch", "end of an epoch", "mid-epoch again"])
def test_stopped_and_resumed_equals_uninterrupted(
    packed: Path, cache_dir: Path, tmp_path: Path, stop_after: int, changes: dict[str, Any]
) -> None:
    whole, parted = (tiny(packed, cache_dir, tmp_path / kind, changes) for kind in ("whole", "parted"))
    one, two = Record(), Record()
    train(whole, local(whole, one))
    steps = iter(range(1, 100))
    with pytest.raises(Stopped):
        train(parted, local(parted, two, should_stop=lambda: next(steps) >= stop_after))
    train(parted, local(parted, two))
    assert science(one.rows) == science(two.rows)
    assert_equal(newest(run_folder(whole)), newest(run_folder(parted)))


def test_two_epochs_killed_and_two_more_equal_four(packed: Path, cache_dir: Path, tmp_path: Path) -> None:
    whole, killed = (tiny(packed, cache_dir, tmp_path / kind, CHANGES) for kind in ("whole", "killed"))
    train(whole, local(whole))
    write_yaml(tmp_path / "killed.yaml", flatten(killed))
    command = [sys.executable, "-m", "meamtm.cli", "train", str(tmp_path / "killed.yaml")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    folder, deadline = run_folder(killed), time.monotonic() + 60
    while not (folder / "epoch-00002").exists():
        assert process.poll() is None, "it ended before its second epoch"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert newest(folder).name != "epoch-00004", "it was killed too late to show anything"
    train(killed, local(killed))
    assert_equal(newest(run_folder(whole)), newest(folder))


def test_an_epoch_that_was_saved_but_not_told_is_told_later(packed: Path, cache_dir: Path, tmp_path: Path) -> None:
    """A process may die between the two: as if it had, the last line of its record is missing."""
    config = absolute(tiny(packed, cache_dir, tmp_path, CHANGES))
    before, after, steps = Record(), Record(), iter(range(1, 100))
    with pytest.raises(Stopped):
        run_here(config, (before,), lambda: next(steps) >= 8)
    lines = run_folder(config) / "metrics.jsonl"
    *told, _lost = lines.read_text().splitlines(keepends=True)
    lines.write_text("".join(told))
    run_here(config, (after,))
    epochs = [row for row in read_rows(lines) if "train/loss" in row]
    assert [row["step"] for row in epochs] == [1, 2, 3, 4]
    assert after.rows[0] == before.rows[-1]
    assert [row["step"] for row in after.rows] == [2, 3, 4]


def test_what_workers_reported_after_their_driver_died_is_told_by_a_plain_run_too(
    packed: Path, cache_dir: Path, tmp_path: Path
) -> None:
    config = absolute(tiny(packed, cache_dir, tmp_path, CHANGES))
    before, after, steps = Record(), Record(), iter(range(1, 100))
    with pytest.raises(Stopped):
        run_here(config, (before,), lambda: next(steps) >= 12)
    folder = run_folder(config)
    told = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text(told[0])
    for row in before.rows[1:]:
        leave_report(folder, {key: value for key, value in row.items() if key != "step"})
    leave_report(folder, {"epoch": 4.0, "train/loss": 99.0})  # after the last checkpoint, so it is trained again
    run_here(config, (after,))
    epochs = [row for row in read_rows(folder / "metrics.jsonl") if "train/loss" in row]
    assert [row["step"] for row in epochs] == [1, 2, 3, 4]
    assert [row["step"] for row in after.rows] == [2, 3, 4]
    assert science(after.rows[:2]) == science(before.rows[1:3])
    assert after.rows[2]["train/loss"] < 99


def test_an_epoch_that_a_trial_saved_and_did_not_tell_is_told_later(
    packed: Path, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tune, too."""
    config = absolute(tiny(packed, cache_dir, tmp_path, CHANGES))
    train(config, local(config))  # which keeps no record at all, so its last epoch is missing
    told: list[dict[str, float]] = []
    monkeypatch.setattr("ray.tune.report", told.append)
    suggestion = {"runs": [flatten(config)], "metric": "valid/accuracy", "is_repeat": False, "at_once": 1}
    run_trial(suggestion)
    assert [row["step"] for row in read_rows(run_folder(config) / "metrics.jsonl")] == [4]
    assert [row["epoch"] for row in told] == [4, 4], "by the epoch, and at the end of its fold"
