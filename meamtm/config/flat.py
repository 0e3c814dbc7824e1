"""Dotted keys <-> settings: read, override, compare, sign. The same dotted key names a knob everywhere.

Changes go through `override`, which rebuilds the whole configuration from one flat mapping, so that no check ever sees
half of a change."""

import difflib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, TypeVar, get_args
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ValidationError

from meamtm.config.encoder import WEIGHT_FILES, preset_keys
from meamtm.config.schema import RunConfig
from meamtm.config.section import is_uri
from meamtm.config.yaml_text import read_value, read_yaml, write_tree
from meamtm.errors import ConfigError

Value = bool | int | float | str | None | list[Any]
Model = TypeVar("Model", bound=BaseModel)

UNSCIENTIFIC = (
    "name",
    "runs_dir",
    "scale.",
    "tracking.",
    "data.cache_dir",
    "train.checkpoint_s",
    "train.deterministic",
    "train.grad_checkpointing",
)
"""Keys (or beginnings of keys) that cannot change a result."""
LATER: dict[str, Any] = {
    "encoder.attention": "joint",
    "encoder.cnn": "none",
    "distill.teacher": "none",
    "distill.weight": 0.5,
    "distill.temperature": 1.0,
    "distill.ensemble": False,
    "pretrain.epochs": 0,
    "pretrain.hidden": 0.6,
}
"""Keys that came when runs had been trained, and what those had been trained with: they keep their signatures."""

OTHER_FILES = {"space": ("study", "python -m tune"), "kind": ("job", "python -m jobs submit")}
"""Keys that no run has, and what has them."""


def flatten(tree: BaseModel | Mapping[str, Any], prefix: str = "") -> dict[str, Value]:
    """Gives every leaf its dotted key; tuples become lists, as in YAML."""
    items = tree.model_dump(mode="json").items() if isinstance(tree, BaseModel) else tree.items()
    flat: dict[str, Value] = {}
    for key, value in items:
        name = f"{prefix}{key}"
        leaves = flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
        if twice := sorted(flat.keys() & leaves.keys()):
            raise ConfigError(f"{twice[0]}={leaves[twice[0]]!r}: comes twice, nested and dotted; keep one of them")
        flat |= leaves
    return flat


def from_flat(flat: Mapping[str, Any]) -> RunConfig:
    """Builds and checks a configuration from dotted keys; what is absent has its default."""
    return build(RunConfig, flat)


def override(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """Returns the configuration with some dotted keys changed, checked as a whole.

    A preset that is asked for anew replaces what it fixes, where no change says otherwise."""
    return from_flat(_changed(flatten(config), flatten(changes)))


def load(path: str | Path, changes: Mapping[str, Any] | None = None) -> RunConfig:
    """Reads a YAML file of differences from the defaults (nested or dotted) and applies further ones."""
    tree = read_yaml(path)
    for key, (what, command) in OTHER_FILES.items():
        if key in tree:
            raise ConfigError(
                f"{path}: {key} makes this the file of a {what} and not of a run; {command} {path} reads it"
            )
    return from_flat(_changed(flatten(tree), flatten(changes or {})))


def _changed(flat: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    preset = changes.get("encoder.preset", flat.get("encoder.preset"))
    fixed = preset_keys(preset) if preset != flat.get("encoder.preset") else frozenset()
    return {key: value for key, value in flat.items() if key not in fixed} | dict(changes)


def differences(config: RunConfig, base: RunConfig | None = None) -> dict[str, Value]:
    """Dotted keys whose values differ from another configuration's, or from the defaults."""
    flat, reference = flatten(config), flatten(base or RunConfig())
    return {key: value for key, value in flat.items() if reference[key] != value}


def signature(config: RunConfig) -> str:
    """Names a run: 8 hex digits of a hash over the keys that can change its result.

    A data set counts by the last part of its path: where it lies changes nothing, and another set of the same name is
    told apart by its digest, which a checkpoint holds. So do weights to begin with, or their folder where the file has
    the name that Hugging Face gives to all, and a teacher's run. How a teacher teaches, or hidden patches are guessed,
    counts where that happens.
    """
    idle = {"distill.": config.distill.teacher == "none", "pretrain.": config.pretrain.epochs == 0}
    left_out = (*UNSCIENTIFIC, *(section for section, is_idle in idle.items() if is_idle))
    flat = {key: value for key, value in flatten(config).items() if not key.startswith(left_out)}
    flat = {key: value for key, value in flat.items() if key not in LATER or value != LATER[key]}
    flat["data.path"] = data_name(config.data.path)
    if flat["data.cache"] != "none":  # without a cache clips come in another order; which one there is decides nothing
        del flat["data.cache"]
    if (path := config.encoder.pretrained_path) is not None:
        flat["encoder.pretrained"] = (path.parent if path.name in WEIGHT_FILES else path).name
    if "distill.teacher" in flat:
        flat["distill.teacher"] = PurePath(config.distill.teacher).name
    return hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()[:8]


def data_name(path: str) -> str:
    """The last part of a data set's path, or of a URI without its query."""
    return PurePath(urlsplit(path).path if is_uri(path) else path).name


def run_name(config: RunConfig) -> str:
    """Name and signature: the run folder, the Ray run and the MLflow run."""
    return f"{config.name}-{signature(config)}"


def run_folder(config: RunConfig) -> Path:
    """Names the folder of everything that a run writes."""
    return Path(config.runs_dir) / run_name(config)


def parse_changes(words: Sequence[str]) -> dict[str, Any]:
    """Reads KEY=VALUE words; values are YAML."""
    changes: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise ConfigError(f"{word!r} is not KEY=VALUE; write for example optim.lr=3e-4")
        try:
            changes[key] = read_value(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"{key}={text}: not a YAML value; quote it or check its brackets") from error
    return changes


def write_yaml(path: Path, flat: Mapping[str, Any], header: str = "") -> None:
    """Writes dotted keys as a nested YAML file, whole or not at all, and without the passwords in its URIs."""
    write_tree(path, nest({key: _without_password(key, value) for key, value in flat.items()}), header)


def _without_password(key: str, value: Any) -> Any:
    """Drops user and password from a URI, and from those in a tree, which then come from the environment.

    A tracking server's password may hold what should have been quoted; elsewhere an @ may belong to a path."""
    if isinstance(value, Mapping):
        return {name: _without_password(f"{key}.{name}", one) for name, one in value.items()}
    if isinstance(value, list):
        return [_without_password(key, one) for one in value]
    if not isinstance(value, str) or "://" not in value:
        return value
    user = r"://\S*@" if key.endswith("tracking.uri") else r"://[^/\s]*@"
    return re.sub(r"(?i)(password|passwd|pwd|token|secret)=[^&\s]+", r"\1=", re.sub(user, "://", value))


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Turns dotted keys into a tree."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, leaf = str(key).split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ConfigError(f"{key}={value!r}: {parent} has a value and keys below it; keep one of them")
        node[leaf] = value
    return tree


def build(model: type[Model], flat: Mapping[str, Any]) -> Model:
    """Builds any settings class from dotted keys; its errors name key, value, rule and remedy. A section that is null,
    as one is in YAML whose keys are all commented out, sets nothing."""
    flat = {key: value for key, value in flat.items() if value is not None or not _is_section(_field(model, key))}
    _check_booleans(model, flat)
    try:
        return model.model_validate(nest(flat))
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(model, problem) for problem in error.errors()[:3])) from error


def _check_booleans(model: type[BaseModel], flat: Mapping[str, Any]) -> None:
    """Refuses a true or false where a number belongs: Python takes them for 1 and 0, and YAML on and off for them."""
    for key, value in flatten(flat).items():
        field = _field(model, key)
        if field is None or _takes(field.annotation, bool) or not _takes(field.annotation, int, float):
            continue
        if any(isinstance(one, bool) for one in (value if isinstance(value, list) else [value])):
            raise ConfigError(
                f"{key}={value!r}: is no number, and YAML reads on, off, yes and no so too; "
                f"{key} is: {field.description} (default {_written(field.default)})"
            )


def _takes(annotation: Any, *kinds: type) -> bool:
    return annotation in kinds or any(_takes(one, *kinds) for one in get_args(annotation))


def _explain(model: type[BaseModel], problem: Any) -> str:
    place, value = [str(part) for part in problem["loc"]], problem["input"]
    depths = [depth for depth in range(1, len(place) + 1) if _field(model, ".".join(place[:depth])) is not None]
    depth = depths[-1] if depths else 0
    field_key, key = ".".join(place[:depth]), ".".join(place)
    if (
        depth and problem["type"] != "extra_forbidden"
    ):  # what follows tells positions, and which of several types it was
        key = ".".join([field_key, *(part for part in place[depth:] if part.isdigit())])
    if problem["type"] == "extra_forbidden":
        near = nearest(key, known_keys(model))
        return f"{key}={value!r}: no such key" + (f"; did you mean {near}?" if near else "; see `meamtm show`")
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    field = _field(model, field_key)
    meaning = (
        f"; {field_key} is: {field.description} (default {_written(field.default)})"
        if field is not None and field.description
        else ""
    )
    if value in ("None", "none") and field is not None and _takes(field.annotation, type(None)):
        return f"{key}={value!r}: is a word here; none at all is null{meaning}"
    return f"{key}={value!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}{meaning}"


def _written(default: Any) -> str:
    return "null" if default is None else repr(default)


def nearest(word: str, known: Sequence[str]) -> str | None:
    """Guesses which of the known words was meant: those of the same name in other sections, or the most similar one."""
    last = word.rpartition(".")[2]
    if elsewhere := [name for name in known if name.rpartition(".")[2] == last]:
        return " or ".join(elsewhere)
    return next(iter(difflib.get_close_matches(word, known, n=1, cutoff=0.4)), None)


def known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """All dotted keys of a settings class."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            keys += known_keys(kind, f"{prefix}{name}.")
        else:
            keys.append(f"{prefix}{name}")
    return keys


def _is_section(field: Any) -> bool:
    return field is not None and isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def _field(model: type[BaseModel], key: str) -> Any:
    field = None
    for part in key.split("."):
        field = model.model_fields.get(part) if isinstance(model, type) and issubclass(model, BaseModel) else None
        if field is None:
            return None
        model = field.annotation  # type: ignore[assignment]
    return field


def describe(model: type[BaseModel], key: str) -> str:
    """Gives the meaning of a dotted key, with its unit."""
    field = _field(model, key)
    return (field.description or "") if field is not None else ""
