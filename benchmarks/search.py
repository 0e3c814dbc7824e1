"""How much of the machine a study uses, and how soon its trials begin.

Runs `python -m tune STUDY KEY=VALUE ...` in a folder of its own and reads the machine's processor times meanwhile, so
nothing else should run. Between the first trial's start and the last one's end: the share of the cores' time that was
idle, and epochs a minute; and for each trial the time from its suggestion to its first step.

    python benchmarks/search.py [configs/tune/esc10.yaml trials=12]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from meamtm.tracking import read_rows

sys.path.insert(0, str(Path(__file__).parents[1]))  # where `tune` lies, which is not installed
from tune.history import open_study, rows, trained
from tune.plan import Plan, load_plan


class Processors:
    """Processor time that all programs together have taken, second by second, while a `with` block runs."""

    def __init__(self) -> None:
        self.times_s: list[float] = []
        self.busy_s: list[float] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "Processors":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def idle_share(self, begin_s: float, end_s: float) -> float:
        """Of all cores' time between two moments, in Unix seconds."""
        begin, end = np.interp([begin_s, end_s], self.times_s, self.busy_s)
        return 1 - (end - begin) / ((end_s - begin_s) * (psutil.cpu_count() or 1))

    def _watch(self) -> None:
        while not self._done.wait(1.0):
            times = psutil.cpu_times()
            self.times_s.append(time.time())
            self.busy_s.append(sum(times) - times.idle - times.iowait)


def measure(plan: Plan, processors: Processors) -> dict[str, Any]:
    """Reads what a finished study left behind."""
    study = open_study(plan)
    begin_s = [trial.datetime_start.timestamp() for trial in trained(study) if trial.datetime_start]
    end_s = [trial.datetime_complete.timestamp() for trial in trained(study) if trial.datetime_complete]
    waits_s = [first_step_s(plan, trial.number) - begin for trial, begin in zip(trained(study), begin_s, strict=True)]
    is_first = [begin < min(end_s) for begin in begin_s]  # of its process, which has yet to start
    return {
        "trials": len(begin_s),
        "idle_percent": 100 * processors.idle_share(min(begin_s), max(end_s)),
        "epochs_per_minute": sum(row.epochs for row in rows(study)) / (max(end_s) - min(begin_s)) * 60,
        "in_a_new_process_s": [wait for wait, first in zip(waits_s, is_first, strict=True) if first],
        "in_one_used_again_s": [wait for wait, first in zip(waits_s, is_first, strict=True) if not first],
    }


def first_step_s(plan: Plan, number: int) -> float:
    """When a trial's first epoch began, in Unix seconds."""
    files = (plan.folder / "trials").glob(f"trial-{number:04d}*/metrics.jsonl")
    epochs = [row for path in files for row in read_rows(path) if "time/epoch_s" in row]
    return min(row["time"] - row["time/epoch_s"] for row in epochs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", default=["configs/tune/esc10.yaml", "trials=12"])
    study, *words = parser.parse_args().words
    with tempfile.TemporaryDirectory() as scratch:
        words = [*words, f"studies_dir={scratch}/studies", f"runs_dir={scratch}/runs"]
        words.append(f"tracking.uri=sqlite:///{scratch}/mlflow.db")
        with Processors() as processors:
            subprocess.run([sys.executable, "-m", "tune", study, *words], check=True)
        found = measure(load_plan(study, words), processors)
    print(f"{found['trials']} trials, {found['epochs_per_minute']:.1f} epochs a minute")
    print(f"idle: {found['idle_percent']:.1f} % of the cores' time")
    for where in ("in_a_new_process_s", "in_one_used_again_s"):
        waits_s = sorted(found[where])
        name = where.removesuffix("_s").replace("_", " ")
        print(
            f"start of a trial to its first step, {name}: {statistics.median(waits_s):.2f} s, at most {waits_s[-1]:.2f}"
        )
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
