"""A run on Ray Train workers: the only file of meamtm that imports Ray.

Ray brings up the processes, their process group and their restarts; what they execute is `train(config, context)`. A
run's Ray name is its run folder's, so Ray's checkpoints are the run's and the same command continues it. Workers keep
no record: rank 0 leaves each epoch's metrics in a file of the run folder, where the process that started the run finds
them, since Ray loses the last reports of a worker that dies."""

import logging
import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from pathlib import Path
from threading import Thread, current_thread, main_thread
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from meamtm.config import RunConfig, ScaleConfig, flatten, from_flat, run_name
from meamtm.data.packed import read_card
from meamtm.errors import ConfigError, MeamtmError, ServiceError
from meamtm.model.memory import check_memory
from meamtm.tracking import Sink
from meamtm.training.checkpoint import NUM_KEPT, newest
from meamtm.training.context import Stopped
from meamtm.training.notes import POLL_S, following, is_told_to_stop, leave_report, stop_sign
from meamtm.training.run import (
    Outcome,
    absolute,
    conclude,
    finished,
    open_record,
    run_folder,
    run_here,
    send_rest,
)
from meamtm.training.train import train

if TYPE_CHECKING:
    import ray.train
    import ray.train.torch

logger = logging.getLogger(__name__)
CONNECT_S = 10.0
GPU_STEPS = 16
ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # Ray's 2 s would be longer than a small epoch
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Ray's future default; silences its warning
    "RAY_USAGE_STATS_ENABLED": "0",
    "GOMP_SPINCOUNT": "10000",  # as in cli.main
}


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
    if (done := finished(config)) is not None:
        send_rest(config)
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
    use_gpu = uses_gpu(scale)
    per_worker = {"CPU": scale.cpus_per_worker} | ({"GPU": scale.gpus_per_worker} if use_gpu else {})
    threads = str(scale.threads or max(1, int(scale.cpus_per_worker)))
    return ray.train.torch.TorchTrainer(
        _train_on_worker,
        train_loop_config=flatten(config),
        torch_config=ray.train.torch.TorchConfig(backend="nccl" if use_gpu else "gloo"),
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
            worker_runtime_env={"env_vars": {"OMP_NUM_THREADS": threads, "GOMP_SPINCOUNT": "10000"}},
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


def connect(address: str | None = None, *, dashboard: bool = False) -> None:
    """Joins the Ray cluster at `scale.address` or RAY_ADDRESS, or starts one on this machine; once per process."""
    import ray

    if ray.is_initialized():
        return
    os.environ.update({key: value for key, value in ENVIRONMENT.items() if key not in os.environ})
    address = address or os.environ.get("RAY_ADDRESS") or None
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    if address is not None:
        _check_answers(address)
    try:
        if address:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        else:
            with _on_loopback():
                ray.init(include_dashboard=dashboard, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise ServiceError(
            f"scale.address={address or 'null'}: Ray does not start or answer ({_first_line(error)}); start a "
            f"cluster with `ray start --head`, or leave scale.address and RAY_ADDRESS unset for one on this machine"
        ) from error
    for number, handler in handlers.items():  # Ray has put its own in the place of ours
        if callable(handler) and current_thread() is main_thread():
            signal.signal(number, handler)


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Has a cluster that starts meanwhile listen to this machine alone, as Ray's own do on macOS and Windows; on Linux
    Ray would listen to everybody."""
    from ray._private import ray_constants

    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def check_resources(scale: ScaleConfig) -> None:
    """Refuses to wait forever for CPUs or GPUs that the cluster does not have."""
    import ray

    wanted = {"CPU": scale.cpus_per_worker, **({"GPU": scale.gpus_per_worker} if uses_gpu(scale) else {})}
    there = ray.cluster_resources()
    for kind, per_worker in wanted.items():
        if scale.least_workers * per_worker > there.get(kind, 0):
            key, needed = f"scale.{kind.lower()}s_per_worker", scale.least_workers * per_worker
            raise ConfigError(
                f"scale.workers={scale.least_workers} x {key}={per_worker:g} needs {needed:g} {kind}, and the "
                f"cluster has {there.get(kind, 0):g}; lower one of them"
            )


def uses_gpu(scale: ScaleConfig) -> bool:
    """Tells whether workers get GPUs: where asked for, or where the cluster has some and nothing forbids it."""
    import ray

    if scale.device == "auto":
        return ray.is_initialized() and ray.cluster_resources().get("GPU", 0) > 0
    return scale.device == "cuda"


def _train_on_worker(flat: dict[str, Any]) -> dict[str, float] | str:
    config = from_flat(flat)
    torch.set_num_threads(config.scale.threads or max(1, int(config.scale.cpus_per_worker)))
    context = WorkerContext(config)
    card = read_card(config.data.path)
    check_memory(config, len(card.classes), card.num_clips, context.device)
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


def _check_answers(address: str) -> None:
    """Knocks at HOST:PORT or ray://HOST:PORT; `auto` and `local` are Ray's own words."""
    if address in ("auto", "local"):
        return
    parts = urlsplit(address if "://" in address else f"ray://{address}")
    try:
        with socket.create_connection((parts.hostname or "", parts.port or 6379), timeout=CONNECT_S):
            return
    except (OSError, ValueError) as error:
        raise ServiceError(
            f"scale.address={address}: no Ray cluster answers there ({error}); check host and port, start one with "
            f"`ray start --head`, or leave scale.address and RAY_ADDRESS unset for one on this machine"
        ) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200]
