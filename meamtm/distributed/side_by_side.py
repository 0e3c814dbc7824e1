"""Several runs at once, each a plain run in a process of its own, as many as a Ray cluster has room for."""

import math
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import cache
from typing import Any

from meamtm.config import RunConfig, ScaleConfig, flatten, from_flat, override, run_folder
from meamtm.data.packed import read_card
from meamtm.distributed.cluster import check_resources, connect, named_address, needs, nodes, shares, spin_count
from meamtm.distributed.workers import run
from meamtm.errors import MeamtmError
from meamtm.tracking import Listener, Metrics, read_rows
from meamtm.training.context import Stopped
from meamtm.training.lock import HOLDER
from meamtm.training.memory import LIBRARIES_BYTES, peak_training_bytes
from meamtm.training.notes import POLL_S, is_told_to_stop, stop_sign
from meamtm.training.run import Outcome, absolute, recall, run_here
from meamtm.training.teacher import teacher_configs

Heard = Callable[[int, Metrics, int], None]
"""Takes the number of a run, the metrics of one of its epochs and that epoch's number."""


def run_all(
    configs: Sequence[RunConfig], heard: Heard = lambda *_: None, should_stop: Callable[[], bool] = lambda: False
) -> list[Outcome]:
    """Trains, tests and records every run; those that are done are only tested once more.

    Runs with workers of their own follow one another. One run alone trains in this process, unless a cluster is named,
    where this may be a job's process on a head node without GPU. Raises the first error of a run after asking the
    others to save and stop, or Stopped when asked to; the same call continues.
    """
    configs = [absolute(config) for config in configs]
    outcomes = {number: done for number, config in enumerate(configs) if (done := recall(config)) is not None}
    todo = {number: config for number, config in enumerate(configs) if number not in outcomes}
    has_workers = any(config.scale.most_workers > 0 for config in todo.values())
    is_here = len(todo) == 1 and named_address(next(iter(todo.values())).scale.address) is None
    if has_workers or is_here:
        for number, config in todo.items():
            outcomes[number] = _run_alone(number, config, heard, should_stop)
    elif todo:
        outcomes |= _run_side_by_side(todo, heard, should_stop)
    return [outcomes[number] for number in range(len(configs))]


def _run_alone(number: int, config: RunConfig, heard: Heard, should_stop: Callable[[], bool]) -> Outcome:
    listener = Listener(lambda metrics, step: heard(number, metrics, step) if "train/lr" in metrics else None)
    return run(config, [listener], should_stop)


def _run_side_by_side(
    todo: Mapping[int, RunConfig], heard: Heard, should_stop: Callable[[], bool]
) -> dict[int, Outcome]:
    import ray
    from ray.exceptions import RayError

    scale = next(iter(todo.values())).scale
    connect(scale.address)
    check_resources(scale)
    options = _share(todo, scale)
    task = ray.remote(**options)(_run_in_task)
    threads = scale.threads or max(1, int(options["num_cpus"]))
    me = f"-{uuid.uuid4().hex[:8]}"  # a run that another process is at work on is refused, and not stopped
    outcomes: dict[int, Outcome] = {}
    with ExitStack() as stack:
        signs = [stack.enter_context(stop_sign(run_folder(config), me)) for config in todo.values()]
        waiting = {
            task.remote(flatten(override(config, {"scale.threads": threads})), me): number
            for number, config in todo.items()
        }
        ears = {number: _Ear(number, config, heard) for number, config in todo.items()}
        trouble: BaseException | None = None
        while waiting:
            if trouble is None and should_stop():
                trouble = Stopped("stopped; the same command continues")
            if trouble is not None:
                for sign in signs:
                    sign.parent.mkdir(parents=True, exist_ok=True)  # of a run that waits for room, and need not begin
                    sign.touch()
                for reference, number in waiting.items():
                    if not (run_folder(todo[number]) / HOLDER).exists():  # it waits for room, and hears nobody
                        ray.cancel(reference)
            ready, _ = ray.wait(list(waiting), timeout=POLL_S)
            for reference in ready:
                number = waiting.pop(reference)
                try:
                    result = ray.get(reference)
                except RayError as error:
                    trouble = trouble or _mistake(error)
                    continue
                if isinstance(result, Outcome):
                    outcomes[number] = result
                else:
                    trouble = trouble or Stopped(result)
            for ear in ears.values():
                ear.listen()
    if trouble is not None:
        raise trouble
    return outcomes


def _run_in_task(flat: dict[str, Any], driver: str) -> Outcome | str:
    config = from_flat(flat)
    folder = run_folder(config)
    try:
        if is_told_to_stop(folder, driver):
            raise Stopped("stopped before it began")
        return run_here(config, should_stop=lambda: is_told_to_stop(folder, driver))
    except Stopped as stop:  # which Ray must not take for a failure
        return str(stop)


def _share(todo: Mapping[int, RunConfig], scale: ScaleConfig) -> dict[str, Any]:
    """Gives each run an equal share of the processors of nodes that can take one, `scale.cpus_per_worker` at least, and
    the memory of the largest. Where GPUs tell how many run at once, a node's processors are shared by these alone.

    Memory is reserved as far as a node has it; what cannot fit at all is refused by the run itself.
    """
    needed = largest_peak_bytes(todo.values()) + LIBRARIES_BYTES
    wanted = needs(scale)
    able = [node for node in nodes() if all(node.get(kind, 0) >= amount for kind, amount in wanted.items())]
    if "GPU" not in wanted:
        able = [node for node in able if node.get("memory", 0) >= needed] or able
    largest = max(able, key=lambda node: node["CPU"])  # no run is on two nodes
    even = sum(node["CPU"] for node in able) / len(todo)
    if "GPU" in wanted:
        even = min(node["CPU"] / min(len(todo), shares("GPU", node["GPU"], wanted["GPU"])) for node in able)
    return {
        "num_cpus": max(scale.cpus_per_worker, math.floor(min(even, largest["CPU"]))),
        "num_gpus": wanted.get("GPU", 0),
        "memory": 0 if "GPU" in wanted else min(needed, int(largest.get("memory", 0))),
        "max_retries": scale.max_failures,  # of a process or node that dies; what a run raises is not tried again
        "runtime_env": {"env_vars": spin_count()},
    }


def largest_peak_bytes(configs: Iterable[RunConfig]) -> int:
    """Estimates the most memory that a run allocates."""
    labels = cache(lambda path: len(read_card(path).classes))
    return max(
        peak_training_bytes(config, labels(config.data.path), teachers=teacher_configs(config)) for config in configs
    )


def _mistake(error: BaseException) -> BaseException:
    """Finds what a run has raised inside what Ray made of it."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, MeamtmError) else error


class _Ear:
    """Hears of a run's epochs from the record in its folder, wherever it runs."""

    def __init__(self, number: int, config: RunConfig, heard: Heard) -> None:
        self._number, self._path, self._heard = number, run_folder(config) / "metrics.jsonl", heard
        self._size_bytes, self._step = 0, 0

    def listen(self) -> None:
        """Passes on what is new."""
        if not self._path.exists() or (size_bytes := self._path.stat().st_size) == self._size_bytes:
            return
        self._size_bytes = size_bytes
        for row in read_rows(self._path):
            if "train/lr" in row and row["step"] > self._step:
                self._step = int(row["step"])
                self._heard(self._number, row, self._step)
