"""What a finished study found <-> result.json in its folder, so that a second command only has to read."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from meamtm.config import Value
from meamtm.files import whole_file
from tune.config import StudyConfig
from tune.plan import Plan


@dataclass(frozen=True)
class Row:
    """One trial, as tables show it."""

    number: int
    state: str
    value: float | None
    epochs: int
    elapsed_s: float | None
    point: dict[str, Value]
    error: str | None
    cost: float | None = None
    """What was to be spared, if anything."""
    repeats: int | None = None
    """Number of the finalist that this one is again, with another seed."""
    seed: int | None = None
    """That seed."""


@dataclass(frozen=True)
class Result:
    """Every trial, the best one, and what it is worth after training on train + validation."""

    study: str
    folder: str
    objective: str
    trials: int
    """Asked for, which may be more than there are when time ran out."""
    time_budget_s: float | None
    rows: tuple[Row, ...]
    best: int
    """Number of the best trial."""
    run_folder: str
    checkpoint: str
    test: dict[str, float] | None
    """None where no clip is held out."""
    mlflow_uri: str | None
    mlflow_run_id: str | None
    finalists: int = 1
    finalist_seeds: int = 2
    data_digest: str | None = None
    """Of the data set; None in a result of an earlier version."""

    def covers(self, config: StudyConfig) -> bool:
        """Whether nothing is left to do for a study of so many trials and finalists."""
        enough = self.num_ended >= config.trials
        same = (self.trials, self.time_budget_s) == (config.trials, config.time_budget_s)
        again = (self.finalists, self.finalist_seeds) == (config.finalists, config.finalist_seeds)
        return (enough or same) and (again or config.finalists == self.finalists == 1)

    @property
    def is_there(self) -> bool:
        """Whether the study and its best run lie where this result says, as they do not once they were moved."""
        return Path(self.folder).exists() and Path(self.run_folder).exists()

    @property
    def num_ended(self) -> int:
        """Trials of the search that ended, whichever way."""
        return sum(row.repeats is None and row.state in ("COMPLETE", "PRUNED", "FAIL") for row in self.rows)

    @property
    def best_row(self) -> Row:
        """The best trial."""
        return next(row for row in self.rows if row.number == self.best)


def pareto_front(rows: Sequence[Row], mode: str) -> list[Row]:
    """Trials of the search that no cheaper one equals, best first; of equals the cheapest."""
    sign = 1 if mode == "max" else -1
    ended = [(-sign * row.value, row.cost, row) for row in rows if row.value is not None and row.cost is not None]
    front: list[Row] = []
    for _, cost, row in sorted(ended, key=lambda each: (*each[:2], each[2].number)):
        if row.repeats is None and all(cost < (better.cost or 0.0) for better in front):
            front.append(row)
    return front


def pareto_fronts(rows: Sequence[Row], mode: str) -> list[list[Row]]:
    """The front, the front of what it leaves, and so on (non-dominated sorting, Goldberg 1989)."""
    fronts, left = [], list(rows)
    while front := pareto_front(left, mode):
        fronts.append(front)
        left = [row for row in left if row not in front]
    return fronts


def read_result(plan: Plan) -> Result | None:
    """Reads what the study found, or None if it is not finished."""
    path = plan.folder / "result.json"
    if not path.exists():
        return None
    fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return Result(**{**fields, "rows": tuple(Row(**row) for row in fields["rows"])})


def write_result(plan: Plan, result: Result) -> None:
    """Keeps what the study found, whole or not at all."""
    with whole_file(plan.folder / "result.json") as scratch:
        scratch.write_text(json.dumps(asdict(result), indent=1) + "\n", encoding="utf-8")
