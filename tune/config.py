"""What a study is: settings as a YAML file holds them, each with its meaning and default."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from meamtm.config import Folder, Name, Section, build, flatten
from meamtm.errors import ConfigError
from tune.space import Range, number, parse_ranges

Metrics = Literal["valid/accuracy", "valid/macro_f1", "valid/map", "valid/loss"]
"""`valid/map`, mean average precision, is there where clips have several labels."""
Costs = Literal["params", "macs", "tokens"]
ACCURACY: Metrics = "valid/accuracy"
MAP: Metrics = "valid/map"


class AshaConfig(Section):
    """Asynchronous successive halving (Li 2020): hopeless trials end early."""

    enabled: bool = Field(default=True, description="false: every trial trains to its end")
    grace_epochs: int = Field(
        default=10,
        ge=1,
        description="epochs that every trial gets after pretrain.epochs; from train.epochs on, all",
    )
    reduction: float = Field(default=3.0, gt=1, le=100, description="of this many trials at a rung, about one goes on")


class LimitsConfig(Section):
    """What a model may cost at most; suggestions over a limit are rejected before they train."""

    max_params: int | None = Field(default=None, ge=1, description="trainable parameters; null: no limit")
    max_macs: float | None = Field(
        default=None, gt=0, description="multiply-adds of one clip forward, without its spectrogram; null: no limit"
    )
    max_tokens: int | None = Field(default=None, ge=1, description="tokens that the encoder sees; null: no limit")


class StudyConfig(Section):
    """Everything that a study is."""

    name: Name = Field("study", description="first part of the study folder's name")
    studies_dir: Folder = Field("studies", description="folder of all study folders")
    base: str | None = Field(None, description="YAML file of the run that trials start from; null: the defaults")
    set: dict[str, Any] = Field({}, description="changes to the base run: dotted keys and values")
    space: dict[str, Range] = Field({}, description="searched keys: log_uniform, uniform, int or choice, and when")
    start: tuple[dict[str, Any], ...] = Field((), description="points to try first; keys left out are suggested")
    objective: Metrics | tuple[Metrics, Costs] = Field(
        ACCURACY,
        description="metric of the last epoch that is compared; [metric, cost] seeks the best for each cost, "
        "which is params, macs or tokens, and ends no trial early",
    )
    inner_folds: tuple[int, ...] = Field(
        (), description="a trial trains for each of these, validates on it and is worth the mean; (): data.valid_fold"
    )
    race_p: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="where accuracy is compared, a trial ends after a fold if it names fewer clips right than the best "
        "one, by luck with this probability at most (McNemar's, for two; the best of many was lucky itself); 0: never",
    )
    finalists: int = Field(
        1,
        ge=1,
        le=1000,
        description="best trials that train again with other seeds, which choose; 1: the luckiest wins",
    )
    finalist_seeds: int = Field(2, ge=1, le=1000, description="seeds that each finalist trains again with")
    trials: int = Field(20, ge=1, le=100_000, description="trials in all, those of earlier commands included")
    startup_trials: int = Field(8, ge=1, description="trials, start points among them, before TPE begins to learn")
    max_concurrent: int | None = Field(None, ge=1, description="trials at a time; null: as many as the cluster holds")
    max_failed_trials: int = Field(
        3, ge=0, description="failed trials that a search survives; the same command may go on"
    )
    time_budget_s: float | None = Field(
        None, gt=0, description="seconds of searching; a study goes on when it is changed; null: no limit"
    )
    seed: int = Field(0, ge=0, lt=2**31, description="of the suggestions; a trial's own seed is train.seed")
    asha: AshaConfig = AshaConfig()
    limits: LimitsConfig = LimitsConfig()

    @property
    def metric(self) -> Metrics:
        """What is measured of a trial."""
        return self.objective if isinstance(self.objective, str) else self.objective[0]

    @property
    def mode(self) -> Literal["max", "min"]:
        """Whether more or less of it is better."""
        return mode_of(self.metric)

    @property
    def cost(self) -> Costs | None:
        """What is to be spared beside it."""
        return None if isinstance(self.objective, str) else self.objective[1]

    @model_validator(mode="after")
    def _check(self) -> "StudyConfig":
        if twice := sorted({fold for fold in self.inner_folds if self.inner_folds.count(fold) > 1}):
            raise ValueError(f"inner_folds={list(self.inner_folds)} names fold {twice[0]} twice; name each once")
        return self

    @field_validator("set", mode="before")
    @classmethod
    def _flat_set(cls, given: Any) -> Any:
        return flatten(given) if isinstance(given, Mapping) else given

    @field_validator("space", mode="before")
    @classmethod
    def _flat_space(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        return {key: _range(key, below) for key, below in parse_ranges(given).items()}

    @field_validator("start", mode="before")
    @classmethod
    def _flat_start(cls, given: Any) -> Any:
        if not isinstance(given, list | tuple):
            return given
        return [_point(point) if isinstance(point, Mapping) else point for point in given]


def mode_of(metric: str) -> Literal["max", "min"]:
    """Says whether more or less of a metric is better."""
    return "min" if metric == "valid/loss" else "max"


def _range(key: str, given: Mapping[str, Any]) -> Range:
    try:
        return build(Range, given)
    except ConfigError as error:
        raise ConfigError(f"space.{key}: {error}") from error


def _point(given: Mapping[str, Any]) -> dict[str, Any]:
    return {key: number(value) for key, value in flatten(given).items()}
