"""Ranges of dotted keys, some of them conditional -> one suggestion: a flat mapping that `override` accepts.

A `Space` is called with anything that suggests values as an Optuna trial does. Lists (`encoder.stem_channels`) reach
Optuna as JSON text, because its storage knows numbers, booleans and text only."""

import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

from pydantic import ConfigDict, Field, field_validator, model_validator

from meamtm.config import Section, Value, flatten
from meamtm.errors import ConfigError


class Suggester(Protocol):
    """What a space needs of a trial."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...  # noqa: D102
    def suggest_int(self, name: str, low: int, high: int) -> int: ...  # noqa: D102
    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...  # noqa: D102


class Range(Section):
    """Where one key is searched, and when it exists at all."""

    model_config = ConfigDict(populate_by_name=True)

    log_uniform: tuple[float, float] | None = Field(None, description="lowest and highest, equally likely per decade")
    uniform: tuple[float, float] | None = Field(None, description="lowest and highest, equally likely everywhere")
    integer: tuple[int, int] | None = Field(None, alias="int", description="lowest and highest whole number, inclusive")
    choice: tuple[Any, ...] | None = Field(None, description="the values themselves")
    when: dict[str, Any] = Field({}, description="other searched keys and the value, or list of values, they must have")

    @field_validator("when", mode="before")
    @classmethod
    def _flat(cls, given: Any) -> Any:
        return {key: number(value) for key, value in flatten(given).items()} if isinstance(given, Mapping) else given

    @field_validator("choice", mode="before")
    @classmethod
    def _numbers(cls, given: Any) -> Any:
        return [number(value) for value in given] if isinstance(given, list) else given

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = {kind: bounds for kind in KINDS if (bounds := self.bounds(kind)) is not None}
        if len(given) != 1:
            named = ", ".join(given) or "none"
            raise ValueError(
                f"give exactly one of {', '.join(KINDS)} (there is {named}); for example {{uniform: [0, 0.3]}}"
            )
        kind, bounds = next(iter(given.items()))
        if kind == "choice":
            if not bounds:
                raise ValueError("choice=[] offers nothing; list at least one value")
        elif not bounds[0] < bounds[1]:
            raise ValueError(
                f"{kind}={list(bounds)}: the lowest value comes first and is below the highest; order them"
            )
        elif kind == "log_uniform" and bounds[0] <= 0:
            raise ValueError(
                f"log_uniform={list(bounds)}: a logarithm needs values above 0; raise the lowest or use uniform"
            )
        return self

    def bounds(self, kind: str) -> Any:
        """The bounds or choices under a kind's YAML name, or None."""
        return getattr(self, "integer" if kind == "int" else kind)

    def corners(self) -> tuple[Value, ...]:
        """The outermost values, or every choice."""
        return next(bounds for kind in KINDS if (bounds := self.bounds(kind)) is not None)

    def contains(self, value: Any) -> bool:
        """Whether the range could suggest a value."""
        if self.choice is not None:
            return any(_same(value, choice) for choice in self.choice)
        low, high = self.corners()
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return False
        return low <= value <= high and (self.integer is None or value == int(value))  # type: ignore[operator]

    def suggest(self, trial: Suggester, key: str) -> Value:
        """Asks a trial for a value."""
        if self.choice is not None:
            return decode(trial.suggest_categorical(key, [encode(choice) for choice in self.choice]))
        if self.integer is not None:
            return trial.suggest_int(key, *self.integer)
        if self.log_uniform is not None:
            return trial.suggest_float(key, *self.log_uniform, log=True)
        assert self.uniform is not None
        return trial.suggest_float(key, *self.uniform)


KINDS = ("log_uniform", "uniform", "int", "choice")
_LIST = "json:"


@dataclass(frozen=True)
class Space:
    """Searched keys, each after those that its condition names. Pickles, so that it can travel with a searcher."""

    ranges: dict[str, Range]

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranges", dict(_ordered(self.ranges)))

    def __call__(self, trial: Suggester) -> dict[str, Value]:
        """Suggests every key whose condition holds; the others are absent, so that the base run's value stays."""
        point: dict[str, Value] = {}
        for key, searched in self.ranges.items():
            if self.active(key, point):
                point[key] = searched.suggest(trial, key)
        return point

    def active(self, key: str, point: Mapping[str, Value]) -> bool:
        """Whether a key exists beside the values of the keys before it."""
        for parent, wanted in self.ranges[key].when.items():
            allowed = wanted if isinstance(wanted, list) else [wanted]
            if parent not in point or not any(_same(point[parent], value) for value in allowed):
                return False
        return True

    def parents(self, key: str) -> dict[str, Value]:
        """Values of other keys under which a key exists."""
        needed: dict[str, Value] = {}
        for parent, wanted in self.ranges[key].when.items():
            needed |= self.parents(parent)
            needed[parent] = wanted[0] if isinstance(wanted, list) else wanted
        return needed

    def draw(self, generator: random.Random, fixed: Mapping[str, Value] | None = None) -> dict[str, Value]:
        """Draws one point at random, some of its keys given."""
        return self(RandomTrial(generator, {key: encode(value) for key, value in (fixed or {}).items()}))

    @property
    def is_conditional(self) -> bool:
        """Whether some key exists only beside certain values of others."""
        return any(searched.when for searched in self.ranges.values())


@dataclass(frozen=True)
class RandomTrial:
    """Suggests at random, except for what is fixed; tries a space without Optuna."""

    generator: random.Random
    fixed: Mapping[str, Any]

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """A float within the bounds, inclusive."""
        if name in self.fixed:
            return self.fixed[name]
        if log:
            return min(high, max(low, math.exp(self.generator.uniform(math.log(low), math.log(high)))))
        return self.generator.uniform(low, high)

    def suggest_int(self, name: str, low: int, high: int) -> int:
        """A whole number within the bounds, inclusive."""
        return self.fixed[name] if name in self.fixed else self.generator.randint(low, high)

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """One of the choices."""
        return self.fixed[name] if name in self.fixed else self.generator.choice(choices)


def number(value: Any) -> Any:
    """Reads 1e-3, which YAML 1.1 takes for text, as the number that it is; leaves everything else alone."""
    if isinstance(value, list):
        return [number(part) for part in value]
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def encode(value: Any) -> Any:
    """Turns a list into text that Optuna can store; leaves other values alone."""
    return _LIST + json.dumps(list(value)) if isinstance(value, list | tuple) else value


def decode(value: Any) -> Any:
    """Undoes `encode`."""
    return json.loads(value[len(_LIST) :]) if isinstance(value, str) and value.startswith(_LIST) else value


def parse_ranges(tree: Any) -> Any:
    """Gives every range in a nested or dotted tree its dotted key."""
    return dict(_ranges_of(tree, "")) if isinstance(tree, Mapping) else tree


def _ranges_of(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, below in tree.items():
        key = f"{prefix}{name}"
        if not isinstance(below, Mapping):
            kinds = ", ".join(KINDS)
            raise ConfigError(
                f"space.{key}={below!r}: not a range; give one of {kinds}, for example {{uniform: [0, 0.3]}}"
            )
        if not below or any(kind in below for kind in (*KINDS, "when")):
            yield key, below
        else:
            yield from _ranges_of(below, f"{key}.")


def _ordered(ranges: Mapping[str, Range]) -> Iterator[tuple[str, Range]]:
    done: set[str] = set()
    waiting = dict(ranges)
    while waiting:
        ready = [key for key, searched in waiting.items() if done.issuperset(searched.when)]
        if not ready:
            _explain_order(ranges, waiting)
        for key in ready:
            yield key, waiting.pop(key)
        done.update(ready)


def _explain_order(ranges: Mapping[str, Range], waiting: Mapping[str, Range]) -> None:
    for key, searched in waiting.items():
        for parent in searched.when:
            if parent not in ranges:
                raise ConfigError(
                    f"space.{key}.when.{parent}: {parent} is not searched, so the condition never changes; "
                    f"add {parent} to the space or drop the condition"
                )
    raise ConfigError(
        f"space: the conditions of {', '.join(waiting)} refer to each other in a circle; drop one of them"
    )


def _same(left: Any, right: Any) -> bool:
    return encode(left) == encode(right) and isinstance(left, bool) == isinstance(right, bool)
