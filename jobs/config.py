"""A job file and KEY=VALUE words -> a JobConfig: what to run on a cluster, checked on this machine first."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from meamtm.config import Folder, Name, Section, build, flatten, parse_changes, read_yaml
from meamtm.tracking import hide_password

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
# Anchored by a slash: these are gitignore patterns, and a bare `data` would leave out meamtm/data too.
EXCLUDES = (
    "/.git/",
    "/.venv/",
    "/data/",
    "/runs/",
    "/studies/",
    "/mlruns/",
    "/mlartifacts/",
    "/mlflow.db*",
    "/tests/",
    "/benchmarks/",
    "__pycache__/",
    ".*_cache/",
    ".hypothesis/",
)
WITH_SEEDS = ("crossval", "nested")


class JobConfig(Section):
    """What to run on a cluster, and how."""

    kind: Literal["train", "crossval", "tune", "nested", "pack"] | None = Field(
        None, description="which command runs; every job names one"
    )
    name: Name = Field("job", description="first part of the job's ID")
    config: str | None = Field(
        None, description="train, crossval: run file; tune, nested: study file; inside working_dir"
    )
    changes: tuple[str, ...] = Field((), description="KEY=VALUE words for the run or the study")
    seeds: int = Field(1, ge=1, description="crossval, nested: runs of each fold")
    source: str | None = Field(None, description="pack: folder of sounds")
    out: Folder | None = Field(None, description="pack: folder of the packed data set")
    manifest: str | None = Field(None, description="pack: CSV of paths and labels")
    address: str | None = Field(
        None, description=f"Ray's dashboard; null: RAY_API_SERVER_ADDRESS, RAY_ADDRESS if http, then {DEFAULT_ADDRESS}"
    )
    shares_files: bool | None = Field(
        None,
        description="does the cluster read this machine's files? null: yes if the address is 127.0.0.1 or localhost",
    )
    home: str | None = Field(
        None, description="folder on the cluster that relative paths start from; null: working_dir, if files are shared"
    )
    tracking_uri: str | None = Field(None, description="MLflow for the job; null: what the run or study would use here")
    working_dir: str = Field(".", description="folder that is copied to the cluster")
    excludes: tuple[str, ...] = Field(
        EXCLUDES, description="gitignore patterns that are not copied, besides .gitignore"
    )
    env: dict[str, str | None] = Field(
        {}, description="environment of the job and its workers; null: the value that it has here"
    )
    cpus: float = Field(0, ge=0, description="CPUs reserved for the entry point itself, not for its workers")
    gpus: float = Field(0, ge=0, description="GPUs reserved for the entry point itself, not for its workers")
    python: str | None = Field(
        None, description="Python there; null: this one if files are shared, else the one on its PATH"
    )
    stop_wait_s: int = Field(30, ge=1, le=3_600, description="seconds a stopped job has to end its MLflow runs")

    @field_validator("env", mode="before")
    @classmethod
    def _words(cls, env: Any) -> Any:
        if not isinstance(env, Mapping):
            return env
        return {str(key): None if value is None else _text(value) for key, value in env.items()}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind is None:
            raise ValueError("kind=null: a job is of a kind; add a line kind: train, crossval, tune, nested or pack")
        needed = ("source", "out") if self.kind == "pack" else ("config",)
        foreign = ("config", "changes") if self.kind == "pack" else ("source", "out", "manifest")
        for key in needed:
            if getattr(self, key) is None:
                raise ValueError(f"{key}=null: kind={self.kind} needs it; add a line {key}: PATH")
        for key in foreign:
            if getattr(self, key):
                raise ValueError(f"{key}={getattr(self, key)!r}: kind={self.kind} does not use it; leave it out")
        if self.seeds != 1 and self.kind not in WITH_SEEDS:
            raise ValueError(f"seeds={self.seeds}: kind={self.kind} does not use it; leave it out")
        if self.address is not None and not self.address.startswith(("http://", "https://")):
            raise ValueError(
                f"address={hide_password(self.address)!r} is not an http(s) address; name Ray's dashboard, such as "
                f"{DEFAULT_ADDRESS}"
            )
        return self


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)  # true, as it was written


def load_job(path: str | Path, words: Sequence[str] = ()) -> JobConfig:
    """Reads a job file; words that name a key of the job change it, all others go to its run or study."""
    own = [word for word in words if word.partition("=")[0].partition(".")[0] in JobConfig.model_fields]
    passed = [word for word in words if word not in own]
    parse_changes(passed)
    job = build(JobConfig, flatten(read_yaml(path)) | parse_changes(own))
    return build(JobConfig, flatten(job) | {"changes": [*job.changes, *passed]}) if passed else job
