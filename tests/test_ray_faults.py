"""Workers, nodes and drivers are killed: the run goes on from its checkpoint, and ends as if nothing had happened."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster
from tiny import PLAIN, Record, local, tiny

from meamtm.config import RunConfig, flatten, run_folder, write_yaml
from meamtm.distributed import run
from meamtm.tracking import read_rows
from meamtm.training.checkpoint import newest, read_record
from meamtm.training.run import Outcome, absolute
from meamtm.training.train import train

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(400),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    # Ray Data, which Ray Train sets up beside every run, builds its own defaults in a way that it calls deprecated.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context"),
]
CHANGES = {**PLAIN, "data.valid_fold": 2, "encoder.stem_activation": "silu", "optim.lr": 1e-3}
"""Two workers then differ from one by 1e-6 (tests/test_parallel.py)."""
SAME = 1e-6


class Nodes:
    """A cluster whose head computes nothing, and nodes of one CPU that come and go."""

    def __init__(self) -> None:
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.nodes = [self.add(), self.add()]
        ray.init(self.cluster.address, log_to_driver=False, logging_level=logging.ERROR)

    def add(self) -> Any:
        """Starts one more."""
        return self.cluster.add_node(num_cpus=1)

    def kill(self) -> None:
        """Kills the one that came first, with all its processes."""
        self.cluster.remove_node(self.nodes.pop(0), allow_graceful=False)

    def close(self) -> None:
        ray.shutdown()
        self.cluster.shutdown()


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    """A cluster of this test's own."""
    ray.shutdown()
    cluster = Nodes()
    yield cluster
    cluster.close()


def until(what: Callable[[], Any], wait_s: float = 120) -> Any:
    """Waits for something to be so, and returns it."""
    deadline_s = time.monotonic() + wait_s
    while not (found := what()):
        assert time.monotonic() < deadline_s, "it never came to be"
        time.sleep(0.05)
    return found


def workers() -> list[psutil.Process]:
    """Processes below this one that train at this moment; tests that run beside it have theirs."""
    return [each for each in psutil.Process().children(recursive=True) if trains(each)]


def trains(process: psutil.Process) -> bool:
    """Says whether a process is a worker of Ray Train."""
    try:
        return "RayTrainWorker" in "".join(process.cmdline()[:1])
    except (psutil.NoSuchProcess, psutil.ZombieProcess):  # it has just died
        return False


def started_anew(before: list[psutil.Process], number: int) -> bool:
    """Says whether so many train, and none of those that did before."""
    return len(now := workers()) == number and not set(now) & set(before)


def in_background(config: RunConfig, record: Record) -> "Future[Outcome]":
    return ThreadPoolExecutor(1).submit(run, config, (record,))


def science(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """What a run measured, without its times; a step of the record is an epoch."""
    return [{key: value for key, value in row.items() if not key.startswith(("time", "step"))} for row in rows]


def assert_as_if_nothing_had_happened(config: RunConfig, rows: list[dict[str, float]], folder: Path) -> None:
    """Compares epochs with those of a plain run, which no fault befell."""
    plain, alone = config.model_copy(update={"runs_dir": str(folder / "plain")}), Record()
    train(plain, local(plain, alone))
    assert [row["epoch"] for row in rows] == list(range(1, config.train.epochs + 1)), "each epoch is there once"
    for row, expected in zip(science(rows), science(alone.rows), strict=True):
        assert row == pytest.approx(expected, abs=SAME), f"epoch {row['epoch']}"


def saved_epoch(folder: Path) -> int:
    """The epoch of a run's newest checkpoint, as soon as there is one."""
    return read_record(until(lambda: newest(folder)))["epoch"]


def assert_is_at_work_again_within(most_s: float, folder: Path, first: int = 1, last: int = sys.maxsize) -> None:
    """Looks at the longest time between two epochs of a record, or of a part of it, which is that of the fault."""
    rows = read_rows(folder / "metrics.jsonl")
    ends_s = [row["time"] for row in rows if "train/loss" in row and first <= row["step"] <= last]
    longest_s = max(after - before for before, after in pairwise(ends_s))
    logging.info("at work again after %.1f s", longest_s)  # for docs/operations.md: pytest --log-level=INFO -rP
    assert longest_s < most_s


def test_a_run_survives_the_death_of_a_worker_and_the_loss_of_a_node(
    nodes: Nodes, packed: Path, cache_dir: Path, tmp_path: Path
) -> None:
    changes = {**CHANGES, "scale.workers": 2, "scale.max_failures": 2, "train.epochs": 40}
    config = absolute(tiny(packed, cache_dir, tmp_path, changes))
    folder, record = run_folder(config), Record()
    running = in_background(config, record)
    until(lambda: newest(folder))
    first = workers()
    first[0].kill()
    until(lambda: started_anew(first, 2))
    died_at = saved_epoch(folder)
    until(lambda: saved_epoch(folder) > died_at)
    second, lost_at = workers(), saved_epoch(folder)
    nodes.kill()
    nodes.nodes.append(nodes.add())
    until(lambda: started_anew(second, 2))
    assert saved_epoch(folder) < 40, "the run is not done by those that were there"
    outcome = running.result(240)
    assert outcome.checkpoint.name == "epoch-00040"
    assert_is_at_work_again_within(60, outcome.folder, last=lost_at)
    assert_is_at_work_again_within(120, outcome.folder, first=lost_at)
    assert_as_if_nothing_had_happened(config, record.rows, tmp_path)
    assert science(read_rows(outcome.folder / "metrics.jsonl"))[:40] == science(record.rows)


def test_an_elastic_run_goes_on_with_what_is_left_and_grows_again(
    nodes: Nodes, packed: Path, cache_dir: Path, tmp_path: Path
) -> None:
    changes = {**CHANGES, "scale.workers": [1, 2], "scale.resize_s": 1, "scale.max_failures": 3, "train.epochs": 200}
    changes["optim.lr"] = 1e-4  # at 1e-3 the rounding of one worker for two grows to 2.5e-6 within 56 epochs
    config = absolute(tiny(packed, cache_dir, tmp_path, changes))
    record = Record()
    running = in_background(config, record)
    folder = run_folder(config)
    until(lambda: newest(folder))
    until(lambda: len(workers()) == 2)
    nodes.kill()
    until(lambda: len(workers()) == 1)
    alone_from = saved_epoch(folder)
    # the next epoch may still be one that both had reported; a worker that is on its own makes the one after it
    until(lambda: saved_epoch(folder) > alone_from + 1)
    assert len(workers()) == 1
    nodes.nodes.append(nodes.add())
    until(lambda: len(workers()) == 2)
    assert running.result(240).checkpoint.name == "epoch-00200"
    assert_is_at_work_again_within(120, folder)
    assert_as_if_nothing_had_happened(config, record.rows, tmp_path)


def command(config: RunConfig, folder: Path) -> subprocess.Popen[str]:
    write_yaml(folder / "run.yaml", flatten(config))
    words = [sys.executable, "-m", "meamtm.cli", "train", str(folder / "run.yaml")]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    return subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def hit(config: RunConfig, folder: Path, number: signal.Signals) -> str:
    """Starts the command, signals it after its next checkpoint, sees its workers end too, and returns what it said."""
    before = newest(run_folder(config))
    with command(config, folder) as process:
        until(lambda: newest(run_folder(config)) != before)
        below = workers()
        assert len(below) == config.scale.workers
        process.send_signal(number)
        told_s = time.monotonic()
        assert process.stderr is not None
        said = process.stderr.read()
        process.wait()
    if number == signal.SIGTERM:
        assert time.monotonic() - told_s < 10
        assert process.returncode == 1
    _, alive = psutil.wait_procs(below, timeout=120)
    assert not alive, "its workers outlive it"
    return said


def test_a_run_on_workers_that_is_stopped_and_then_killed_is_continued_by_the_same_command(
    packed: Path, cache_dir: Path, tmp_path: Path
) -> None:
    changes = {**CHANGES, "scale.workers": 2, "train.epochs": 40, "runs_dir": str(tmp_path / "ray")}
    config = absolute(tiny(packed, cache_dir, tmp_path, changes))
    folder = run_folder(config)
    said = hit(config, tmp_path, signal.SIGTERM)
    assert "the same command continues" in said
    assert "Traceback" not in said
    stopped_at = saved_epoch(folder)
    hit(config, tmp_path, signal.SIGKILL)
    assert stopped_at < saved_epoch(folder) < 40
    with command(config, tmp_path) as last:
        said = last.communicate()[1]
    assert last.returncode == 0, said
    assert_is_at_work_again_within(120, folder)
    rows = [row for row in read_rows(folder / "metrics.jsonl") if "train/loss" in row]
    assert_as_if_nothing_had_happened(config, rows, tmp_path)
