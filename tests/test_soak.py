"""Sixty-five kills at random moments, and nothing to clean up by hand: the end is that of an undisturbed run."""

import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml
from test_resume import CHANGES, assert_equal, science
from test_tune_study import recorded, write_study
from tiny import Record, local, tiny

from meamtm.config import flatten, run_folder, write_yaml
from meamtm.tracking import read_rows
from meamtm.training.checkpoint import newest
from meamtm.training.train import train
from tune.history import open_study
from tune.plan import load_plan

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3_000)]
ROOT = Path(__file__).parents[1]
RUN_KILLS, STUDY_KILLS, REPORT_KILLS = 30, 25, 10


def killed_again_and_again(words: list[str], num_kills: int, longest_s: float) -> subprocess.CompletedProcess[str]:
    """Starts a command and kills it after a random time, so many times; then lets it end."""
    moments, ended = np.random.default_rng(0), []
    command = [sys.executable, "-m", *words]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    for _ in range(num_kills):
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(moments.uniform(0, longest_s))
        if (code := process.poll()) is not None:
            ended.append(code)
        process.kill()
        process.wait()
    assert ended == [], "it ended, with these codes, before it was killed, which shows nothing"
    return subprocess.run(command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True)


def test_a_run_that_is_killed_thirty_times_equals_an_undisturbed_one(packed: Path, tmp_path: Path) -> None:
    """Bit for bit, from the first kills on, which hit the building of the cache."""
    changes = {**CHANGES, "train.epochs": 1_000}
    whole, killed = (tiny(packed, tmp_path / f"{kind} cache", tmp_path / kind, changes) for kind in ("whole", "killed"))
    write_yaml(tmp_path / "killed.yaml", flatten(killed))
    done = killed_again_and_again(["meamtm.cli", "train", str(tmp_path / "killed.yaml")], RUN_KILLS, longest_s=9)
    assert done.returncode == 0, done.stderr
    record = Record()
    train(whole, local(whole, record))
    assert_equal(newest(run_folder(whole)), newest(run_folder(killed)))
    rows = [row for row in read_rows(run_folder(killed) / "metrics.jsonl") if "train/loss" in row]
    assert science(rows) == science(record.rows), "each epoch is in the record once"
    assert not list(run_folder(killed).glob(".*.part"))


def test_a_study_whose_driver_is_killed_twenty_five_times_has_every_trial_once(
    packed: Path, cache_dir: Path, tmp_path: Path, migrated: Path
) -> None:
    path = write_study(tmp_path, packed, cache_dir, migrated)
    settings = yaml.safe_load(path.read_text())
    settings |= {"trials": 24, "asha": {"enabled": False}}
    settings["set"]["train.epochs"] = 40
    path.write_text(yaml.safe_dump(settings))
    done = killed_again_and_again(["tune", str(path)], STUDY_KILLS, longest_s=25)
    assert done.returncode == 0, done.stdout + done.stderr
    plan = load_plan(path)
    trials = open_study(plan).trials
    assert Counter(trial.state.name for trial in trials) == {"COMPLETE": 24}
    assert len({tuple(sorted(trial.params.items())) for trial in trials}) == 24, "none was doubled"
    assert all(sorted(trial.intermediate_values) == list(range(1, 41)) for trial in trials), "no epoch was lost"
    runs = recorded(plan)[plan.name]
    assert Counter(run.info.status for run in runs) == {"FINISHED": 24}

    words, began_s = ["tune", "report", str(path)], time.monotonic()
    killed_again_and_again(words, num_kills=0, longest_s=0)
    told = killed_again_and_again(words, REPORT_KILLS, longest_s=0.6 * (time.monotonic() - began_s))
    assert told.returncode == 0, told.stderr
    figures = sorted((plan.folder / "report").glob("*.png"))
    assert figures
    for figure in figures:
        assert figure.read_bytes().endswith(b"IEND\xaeB`\x82"), f"{figure.name} is torn"
