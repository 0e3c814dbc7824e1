"""A suggestion -> by how much its model exceeds the study's limits, before anything trains."""

from collections.abc import Mapping
from dataclasses import dataclass

from meamtm.config import RunConfig, Value
from meamtm.errors import ConfigError
from tune.config import LimitsConfig
from tune.plan import Plan


@dataclass(frozen=True)
class Room:
    """Memory for what training takes at its peak."""

    num_bytes: float
    num_processes: int
    """which train at once and have as much each"""

    @property
    def name(self) -> str:
        """Says what there is, and what gives more."""
        return (
            f"what each of {self.num_processes} training at once has, {self.num_bytes / 1e9:,.1f} GB; a smaller "
            "max_concurrent leaves more, and limits.max_memory_gb says what there is"
        )


def excess(plan: Plan, number: int, point: Mapping[str, Value], room: Room | None = None) -> tuple[float, str | None]:
    """Returns how far a point is over the limits, as a fraction (at most 0: within them), and why it is refused.

    A point that builds no run at all, or no spectrogram, counts as twice over."""
    from meamtm.model.kernels import make_kernels

    try:
        run = plan.trial(number, point)
        make_kernels(run.mel)  # bands may stay empty
        over, reason = _excess_of_model(plan.config.limits, run)
        if reason is None and (too_large := _excess_of_memory(plan.config.limits, run, room)) is not None:
            return too_large
        return over, reason
    except ConfigError as error:
        return 1.0, str(error)


def _excess_of_model(limits: LimitsConfig, run: RunConfig) -> tuple[float, str | None]:
    given = limits.model_dump(exclude={"max_memory_gb"}, exclude_none=True)
    if not given:
        return 0.0, None
    from meamtm.model.cost import cost

    spent = cost(run)
    counted = {name: getattr(spent, name.replace("max_", "num_")) for name in given}
    worst = max(given, key=lambda name: counted[name] / given[name])
    over = counted[worst] / given[worst] - 1
    return over, f"{counted[worst]} exceed limits.{worst}={given[worst]}" if over > 0 else None


def _excess_of_memory(limits: LimitsConfig, run: RunConfig, room: Room | None) -> tuple[float, str] | None:
    if limits.max_memory_gb is not None:
        there, name = limits.max_memory_gb * 1e9, f"limits.max_memory_gb={limits.max_memory_gb:g}"
    elif room is not None:
        there, name = room.num_bytes, room.name
    else:
        return None
    from meamtm.training.memory import needed_bytes
    from meamtm.training.run import absolute

    needed = needed_bytes(absolute(run))
    return (needed / there - 1, f"{needed / 1e9:,.1f} GB at training's peak exceed {name}") if needed > there else None
