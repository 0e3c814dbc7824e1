"""A run on Ray Train workers.

Ray brings up the processes, their process group and their restarts; what they execute is `train(config, context)`. A
run's Ray name is its run folder's, so Ray's checkpoints are the run's and the same command continues it. Workers keep
no record: rank 0 leaves each epoch's metrics in a file of the run folder, where the process that started the run finds
them, since Ray loses the last reports of a worker that dies."""

import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from meamtm.config import RunConfig, flatten, from_flat, run_folder, run_name
from meamtm.distributed.cluster import ENVIRONMENT, check_resources, connect, needs, spin_count
from meamtm.errors import MeamtmError
from meamtm.tracking import Sink
from meamtm.training.checkpoint import NUM_KEPT, newest
from meamtm.training.context import Stopped
from meamtm.training.memory import check_memory
from meamtm.training.notes import POLL_S, following, is_told_to_stop, leave_report, stop_sign
from meamtm.training.run import Outcome, absolute, conclude, open_record, recall, run_here
from meamtm.training.train import train

if TYPE_CHECKING:
    import ray.train
    import ray.train.torch

logger = logging.getLogger(__name__)
GPU_STEPS = 16
ELASTIC_START_S = "5"
"""So long an elastic run waits for room before it asks again how much there is. Ray says a minute, but counts nodes
every 20 s, and until then takes one that is gone for room."""


def run(
    config: RunConfig, extra_sinks: Sequence[Sink] = (), should_stop: Callable[[], bool] = lambda: False
) -> Outcome:
    """Trains, tests and records a run where `scale` wants it: in this process, or on Ray Train workers."""
    where = run_here if config.scale.most_workers == 0 else run_on_ray
    return where(config, extra_sinks, should_stop)


def run_on_ray(
    config: RunConfig, extra_sinks: Sequence[Sink] = (), should_stop: Callable[[], bool] = lambda: False
) -> Outcome:
    """Trains on `scale.workers` workers, then tests and records here; continues a run that was cut off."""
    import ray.train

    config = absolute(config)
    if (done := recall(config)) is not None:
        return done
    connect(config.scale.address)
    check_resources(config.scale)
    with open_record(config) as sinks:  # whatever is away, be it Ray, data or MLflow, shows before anything is written
        with following(run_folder(config), (sinks, *extra_sinks)), stop_sign(run_folder(config)) as stop:
            result = _in_background(make_trainer(config).fit)
            while not wait([result], timeout=POLL_S).done:
                if should_stop():
                    stop.touch()
            try:
                metrics = result.result().return_value
            except ray.train.TrainingFailedError as error:
                raise _mistake(error) or error from error
        if isinstance(metrics, str):
            raise Stopped(metrics)
        return conclude(config, metrics, sinks)


def make_trainer(
    config: RunConfig, callbacks: Sequence["ray.train.UserCallback"] = ()
) -> "ray.train.torch.TorchTrainer":
    """Builds the Ray Train run of a config whose paths are absolute; `fit().return_value` is the last metrics, or what
    a run says that was asked to stop."""
    import ray.train
    import ray.train.torch

    os.environ.update({key: value for key, value in ENVIRONMENT.items() if key not in os.environ})
    scale = config.scale
    if scale.least_workers < scale.most_workers:
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", ELASTIC_START_S)
    per_worker = needs(scale)
    use_gpu = "GPU" in per_worker
    return ray.train.torch.TorchTrainer(
        _train_on_worker,
        train_loop_config=flatten(config),
        # NCCL wants a GPU for each rank, and Ray puts shares of a GPU onto one.
        torch_config=ray.train.torch.TorchConfig(backend="nccl" if per_worker.get("GPU") == 1 else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=scale.workers,
            use_gpu=use_gpu,
            resources_per_worker=per_worker,
            elastic_resize_monitor_interval_s=scale.resize_s,
        ),
        run_config=ray.train.RunConfig(
            name=run_name(config),
            storage_path=config.runs_dir,
            failure_config=ray.train.FailureConfig(max_failures=scale.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=NUM_KEPT),
            callbacks=list(callbacks),
            worker_runtime_env={"env_vars": {"OMP_NUM_THREADS": str(scale.worker_threads), **spin_count()}},
        ),
    )


class WorkerContext:
    """A Ray Train worker; checkpoints lie in the run folder, which every node must reach."""

    def __init__(self, config: RunConfig) -> None:
        import ray.train
        import ray.train.torch

        context = ray.train.get_context()
        self.rank = context.get_world_rank()
        self.world_size = context.get_world_size()
        self.device: torch.device = ray.train.torch.get_device()
        self._folder = run_folder(config)
        self._num_asked = 0

    def resume_from(self) -> Path | None:
        """Names the newest complete checkpoint in the run folder, whoever wrote it: Ray's workers or a plain run."""
        return newest(self._folder)

    def report(self, metrics: Mapping[str, float], checkpoint: Path | None = None) -> None:
        """Uploads rank 0's checkpoint into the run folder and waits for the other ranks."""
        import ray.train

        if self.rank == 0 and metrics:  # a run that stops has none
            leave_report(self._folder, metrics)
        uploaded = ray.train.Checkpoint.from_directory(checkpoint) if checkpoint is not None else None
        name = checkpoint.name if checkpoint is not None else None
        ray.train.report(dict(metrics), uploaded, checkpoint_dir_name=name)
        if checkpoint is not None:
            shutil.rmtree(checkpoint.parent)

    def should_stop(self) -> bool:
        """Asks rank 0 whether there is a stop sign: after every step, or on GPUs, which it makes wait, after some."""
        self._num_asked += 1
        if self.device.type == "cuda" and self._num_asked % GPU_STEPS:
            return False
        answer = torch.tensor([float(is_told_to_stop(self._folder))], device=self.device)
        if self.world_size > 1:
            dist.broadcast(answer, src=0)
        return bool(answer.item())


def _train_on_worker(flat: dict[str, Any]) -> dict[str, float] | str:
    config = from_flat(flat)
    torch.set_num_threads(config.scale.worker_threads)
    context = WorkerContext(config)
    check_memory(config, context.device)
    try:
        return train(config, context)
    except Stopped as stop:  # which Ray must not take for a failure
        return str(stop)


def _in_background(call: Callable[[], Any]) -> "Future[Any]":
    """Starts a call in a thread, so that this one hears Ctrl-C: Ray's own answer loses the work since a checkpoint."""
    future: Future[Any] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=work, name="Ray Train", daemon=True).start()
    return future


def _mistake(error: BaseException) -> MeamtmError | None:
    """Finds the user's mistake inside a failure that Ray reports."""
    failures = getattr(error, "worker_failures", {})
    for failure in failures.values():
        seen: BaseException | None = failure
        while seen is not None:
            if isinstance(seen, MeamtmError):
                return seen
            seen = seen.__cause__ or getattr(seen, "cause", None)
    return None
