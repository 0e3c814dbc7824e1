"""A study file and KEY=VALUE words -> one checked `Plan`: settings, base run, space, and the study's own folder.

Everything that can be wrong is found here, before Ray, Optuna or MLflow are even imported."""

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meamtm.config import (
    RunConfig,
    Value,
    build,
    differences,
    flatten,
    from_flat,
    known_keys,
    load,
    nearest,
    override,
    parse_changes,
    read_yaml,
    signature,
    write_yaml,
)
from meamtm.errors import ConfigError
from tune.config import StudyConfig
from tune.space import KINDS, Range, Space, encode, parse_ranges


@dataclass(frozen=True)
class Plan:
    """A study that can be run: every corner of its space and every start point builds a valid run."""

    config: StudyConfig
    base: RunConfig
    space: Space

    @property
    def signature(self) -> str:
        """Names a study: 8 hex digits over what its trials are; how many there are, where, how long, and who ends early
        (asha, race_p) or is suggested when (startup_trials) is left out, and may change between two commands."""
        science = {
            "base": signature(self.base),
            "space": {key: searched.model_dump(mode="json") for key, searched in self.config.space.items()},
            "start": self.config.start,
            "objective": [self.config.objective, self.config.mode],
            "inner_folds": self.config.inner_folds,
            "seed": self.config.seed,
            "limits": flatten(self.config.limits),
        }
        return hashlib.sha256(json.dumps(science, sort_keys=True).encode()).hexdigest()[:8]

    @property
    def name(self) -> str:
        """Name and signature: the study's folder, its Optuna study and its MLflow run."""
        return f"{self.config.name}-{self.signature}"

    @property
    def folder(self) -> Path:
        """Where everything of this study lies."""
        return Path(self.config.studies_dir).expanduser().resolve() / self.name

    @property
    def metrics(self) -> list[str]:
        """What Optuna compares."""
        return [self.config.metric, *([self.config.cost] if self.config.cost is not None else [])]

    @property
    def modes(self) -> list[str]:
        """Whether more ("max") or less ("min") is better of each of them."""
        return [self.config.mode, "min"][: len(self.metrics)]

    @property
    def num_epochs(self) -> int:
        """Epochs of a trial, over all its folds."""
        return self.base.num_epochs * max(1, len(self.config.inner_folds))

    @property
    def grace_epochs(self) -> int | None:
        """Epochs that every trial gets before ASHA may end it, those of pre-training too; None where it ends none."""
        asha = self.config.asha
        ends_early = asha.enabled and self.config.cost is None and asha.grace_epochs < self.base.train.epochs
        return self.base.pretrain.epochs + asha.grace_epochs if ends_early else None

    def trial(self, number: int, point: Mapping[str, Value], seed: int | None = None) -> RunConfig:
        """One trial, in its own folder inside the study's; raises ConfigError where a point builds no run.

        A finalist that trains again has another seed than the base run's.
        """
        place = {"name": f"trial-{number:04d}", "runs_dir": str(self.folder / "trials")}
        return override(self.base, {**point, **place} | ({} if seed is None else {"train.seed": seed}))

    def chosen(self, point: Mapping[str, Value]) -> RunConfig:
        """What a trial becomes once it is chosen: the same, to be trained on train + validation."""
        return override(self.base, {**point, "name": f"{self.config.name}-best", "data.valid_fold": None})

    def runs(self, trial: RunConfig) -> tuple[RunConfig, ...]:
        """What a trial trains, one after the other: itself, or a run for each inner fold."""
        if not self.config.inner_folds:
            return (trial,)
        return tuple(
            override(trial, {"name": f"{trial.name}-fold-{fold}", "data.valid_fold": fold})
            for fold in self.config.inner_folds
        )

    def write(self) -> None:
        """Keeps the complete study beside its results; the file starts the same study again."""
        settings = self.config.model_dump(mode="json", by_alias=True, exclude={"base", "set", "space"})
        space = {
            key: searched.model_dump(mode="json", by_alias=True, exclude_defaults=True)
            for key, searched in self.config.space.items()
        }
        tree = {**settings, "set": differences(self.base), "space": space}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_yaml(self.folder / "study.yaml", tree, f"python -m tune {self.config.studies_dir}/{self.name}/study.yaml")


def load_plan(path: str | Path, words: Sequence[str] = ()) -> Plan:
    """Reads a study file; KEY=VALUE words change the study, or, where they name keys of a run, its base run."""
    changes = parse_changes(words)
    flat = _merge(_flatten_study(read_yaml(path)), changes)
    _check_is_study(path, flat)
    config = build(StudyConfig, flat)
    for key, value in changes.items():
        if (of_run := key.removeprefix("set.")) in config.space:
            raise ConfigError(f"{key}={value!r}: {of_run} is searched here; to fix it, add space.{of_run}=null")
    if not config.space:
        raise ConfigError(
            f"{path}: space is empty, so nothing is searched; add for example optim.lr: {{log_uniform: [1e-4, 1e-2]}}"
        )
    base = load(config.base, config.set) if config.base is not None else from_flat(config.set)
    plan = Plan(config, base, Space(config.space))
    _check_place(plan)
    _check_folds(plan)
    _check_keys(plan)
    _check_conditions(plan)
    _check_corners(plan)
    _check_start(plan)
    return plan


def _check_is_study(path: str | Path, flat: Mapping[str, Any]) -> None:
    sections = {key.partition(".")[0] for key in known_keys(RunConfig)} - StudyConfig.model_fields.keys()
    if strange := sorted(sections & {key.partition(".")[0] for key in flat}):
        raise ConfigError(
            f"{path}: {strange[0]} is a setting of a run, and this is read as a study; put it below set:, or, where "
            f"the file is a run's, write a study with `base: {path}` and a space"
        )


def _flatten_study(tree: Mapping[str, Any]) -> dict[str, Any]:
    flat = {key: value for key, value in tree.items() if key not in ("space", "set")}
    flat = flatten(flat)
    flat |= {f"set.{key}": value for key, value in flatten(tree.get("set") or {}).items()}
    return flat | {f"space.{key}": value for key, value in parse_ranges(tree.get("space") or {}).items()}


def _merge(flat: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Changes of a study's keys replace them; others go to the base run. `space.KEY=null` stops searching a key,
    `space.KEY.uniform=[0, 1]` searches it elsewhere, under the same conditions."""
    own = {key: value for key, value in changes.items() if key.partition(".")[0] in StudyConfig.model_fields}
    of_run = changes.keys() - own.keys()
    for key in [key for key in own if key.startswith("space.") and key.rpartition(".")[2] in KINDS]:
        parent, _, kind = key.rpartition(".")
        conditions = {"when": flat[parent]["when"]} if "when" in flat.get(parent, {}) else {}
        own[parent] = conditions | (own.get(parent) or {}) | {kind: own.pop(key)}
    for key, value in own.items():
        if value is None and key.startswith("space.") and key not in flat:
            near = nearest(key, [known for known in flat if known.startswith("space.")])
            raise ConfigError(f"{key}=null: it is not searched" + (f"; did you mean {near}?" if near else " anyway"))
    flat = {key: value for key, value in (flat | own).items() if value is not None or not key.startswith("space.")}
    for key in of_run:
        flat[f"set.{_known(key, changes[key])}"] = changes[key]
    return flat


def _known(key: str, value: Value) -> str:
    known = known_keys(RunConfig)
    if key not in known:
        near = nearest(key, [*known_keys(StudyConfig), *known])
        raise ConfigError(
            f"{key}={value!r}: no such key of a study or a run" + (f"; did you mean {near}?" if near else "")
        )
    return key


def _check_place(plan: Plan) -> None:
    if "%" in (place := str(plan.folder)) or "?" in place:
        raise ConfigError(
            f"studies_dir={plan.config.studies_dir}: Optuna's database cannot lie in {place}, since no URI holds % or "
            "?; put studies elsewhere"
        )


def _check_folds(plan: Plan) -> None:
    folds, data = plan.config.inner_folds, plan.base.data
    if folds and data.valid_fold is not None:
        raise ConfigError(
            f"data.valid_fold={data.valid_fold}: inner_folds={list(folds)} says which folds validate; leave one out: "
            "data.valid_fold=null"
        )
    if data.test_fold in folds:
        raise ConfigError(
            f"inner_folds={list(folds)} holds data.test_fold={data.test_fold}, so choices would be made on the test; "
            "take it out"
        )


def _check_keys(plan: Plan) -> None:
    known = known_keys(RunConfig)
    fixed = (
        "data.test_fold",
        "data.valid_fold",
        "data.path",
        "name",
        "runs_dir",
        "train.epochs",
        "pretrain.epochs",
        "train.seed",
    )  # whose luck would be chosen; and finalists have seeds of their own
    for key in plan.space.ranges:
        if key not in known:
            near = nearest(key, known)
            raise ConfigError(
                f"space.{key}: no such key of a run" + (f"; did you mean {near}?" if near else "; see `meamtm show`")
            )
        if key in fixed or key.startswith(("scale.", "tracking.")):
            raise ConfigError(
                f"space.{key}: trials that differ in it cannot be compared; set {key} once for all of them"
            )


def _check_corners(plan: Plan) -> None:
    """Every outermost value builds a run, beside the base run's values or beside some other point of the space."""
    generator = random.Random(0)  # noqa: S311
    for key, searched in plan.space.ranges.items():
        for corner in searched.corners():
            fixed = {**plan.space.parents(key), key: corner}
            if (problem := _problem(plan, fixed)) is not None and all(
                _problem(plan, plan.space.draw(generator, fixed)) is not None for _ in range(50)
            ):
                raise ConfigError(f"space.{key}: {corner!r} builds no run: {problem}")


def _check_conditions(plan: Plan) -> None:
    for key, searched in plan.space.ranges.items():
        for parent, wanted in searched.when.items():
            for value in wanted if isinstance(wanted, list) else [wanted]:
                if not plan.space.ranges[parent].contains(value):
                    raise ConfigError(
                        f"space.{key}.when.{parent}={value!r}: {parent} never has that value "
                        f"({_bounds(plan.space.ranges[parent])}); correct the condition"
                    )


def _check_start(plan: Plan) -> None:
    for position, point in enumerate(plan.config.start):
        for key, value in point.items():
            where = f"start[{position}].{key}={value!r}"
            if key not in plan.space.ranges:
                near = nearest(key, list(plan.space.ranges))
                raise ConfigError(
                    f"{where}: {key} is not searched; " + (f"did you mean {near}?" if near else "add it to the space")
                )
            if not plan.space.ranges[key].contains(value):
                raise ConfigError(
                    f"{where}: outside its range ({_bounds(plan.space.ranges[key])}); widen the range or move the point"
                )
            if not plan.space.active(key, point):
                needed = ", ".join(f"{parent}={wanted!r}" for parent, wanted in plan.space.parents(key).items())
                raise ConfigError(f"{where}: exists only with {needed}; add that to the point or drop {key}")
        if (problem := _problem(plan, point)) is not None:
            raise ConfigError(f"start[{position}] builds no run: {problem}")


def _problem(plan: Plan, point: Mapping[str, Value]) -> str | None:
    try:
        override(plan.base, point)
    except ConfigError as error:
        return str(error)
    return None


def _bounds(searched: Range) -> str:
    return ", ".join(str(encode(corner)).removeprefix("json:") for corner in searched.corners())
