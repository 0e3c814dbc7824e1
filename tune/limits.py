"""A suggestion -> by how much its model exceeds the study's limits, before anything trains."""

from collections.abc import Mapping

from meamtm.config import Value
from meamtm.errors import ConfigError
from tune.plan import Plan


def excess(plan: Plan, number: int, point: Mapping[str, Value]) -> tuple[float, str | None]:
    """Returns how far a point is over the limits, as a fraction (at most 0: within them), and why it is refused.

    A point that builds no run at all, or no spectrogram, counts as twice over."""
    from meamtm.model.kernels import make_kernels

    try:
        run = plan.trial(number, point)
        make_kernels(run.mel)  # bands may stay empty
    except ConfigError as error:
        return 1.0, str(error)
    limits = {name: limit for name, limit in plan.config.limits.model_dump().items() if limit is not None}
    if not limits:
        return 0.0, None
    from meamtm.data.packed import count_labels
    from meamtm.model.cost import cost

    spent = cost(run, count_labels(run.data.path))
    counted = {name: getattr(spent, name.replace("max_", "num_")) for name in limits}
    worst = max(limits, key=lambda name: counted[name] / limits[name])
    over = counted[worst] / limits[worst] - 1
    return over, f"{counted[worst]} exceed limits.{worst}={limits[worst]}" if over > 0 else None
