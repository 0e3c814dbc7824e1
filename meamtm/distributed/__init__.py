"""Where runs happen beyond this process: on Ray, which this room, `tune` and `jobs` alone import."""

from collections.abc import Callable, Sequence

from meamtm.config import RunConfig
from meamtm.distributed.cluster import check_resources, connect, disconnect, uses_gpu
from meamtm.distributed.side_by_side import Heard, run_all
from meamtm.distributed.workers import make_trainer, run_on_ray
from meamtm.tracking import Sink
from meamtm.training.run import Outcome, run_here

__all__ = ["Heard", "check_resources", "connect", "disconnect", "make_trainer", "run", "run_all", "uses_gpu"]


def run(
    config: RunConfig, extra_sinks: Sequence[Sink] = (), should_stop: Callable[[], bool] = lambda: False
) -> Outcome:
    """Trains, tests and records a run where `scale` wants it: in this process, or on Ray Train workers."""
    where = run_here if config.scale.most_workers == 0 else run_on_ray
    return where(config, extra_sinks, should_stop)
