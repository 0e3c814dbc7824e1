"""A JobConfig -> a Submission: exactly what the cluster is asked to do.

Nothing here talks to a cluster. A job is checked on this machine first, so that a typing mistake costs no upload. Where
the cluster reads this machine's files, every relative path and the MLflow database are made absolute: a job runs in a
copy of the working folder, which Ray deletes afterwards, and results written there would go with it."""

import ipaddress
import logging
import os
import re
import secrets
import shlex
import sys
from collections.abc import Mapping
from contextlib import chdir
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import yaml

from jobs.config import DEFAULT_ADDRESS, WITH_SEEDS, JobConfig
from meamtm.config import JOB_HOLDS, RunConfig, TrackingConfig, is_uri, load, parse_changes
from meamtm.errors import ConfigError
from meamtm.tracking import JOB_COMMIT, commit_of, hide_password, resolve_uri
from tune.plan import load_plan

MLFLOW = "MLFLOW_TRACKING_URI"
SECRET = re.compile(r"TOKEN(?!IZER)|PASSWORD|SECRET|KEY(?!BOARD)", re.IGNORECASE)
COMMON = re.compile(r"true|false|on|off|yes|no|null|none|[\d.]{1,5}", re.IGNORECASE)
"""No secret, and in any text."""


@dataclass(frozen=True)
class Submission:
    """What the cluster is asked to do."""

    id: str
    address: str
    entrypoint: str
    runtime_env: dict[str, Any]
    cpus: float
    gpus: float


def find_address(given: str | None = None) -> str:
    """Names the cluster's dashboard: the job file's, the environment's or this machine's."""
    ray_address = os.environ.get("RAY_ADDRESS", "")
    address = (
        given
        or os.environ.get("RAY_API_SERVER_ADDRESS")
        or (ray_address if ray_address.startswith(("http://", "https://")) else "")
        or DEFAULT_ADDRESS
    )
    if not address.startswith(("http://", "https://")):
        given = hide_password(address)
        raise ConfigError(f"address={given} is not an http(s) address; name Ray's dashboard, such as {DEFAULT_ADDRESS}")
    return address.rstrip("/")


def is_this_machine(address: str) -> bool:
    """Tells a loopback address; a forwarded port looks the same, which is what `shares_files: false` is for."""
    host = urlsplit(address).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def prepare(job: JobConfig) -> Submission:
    """Checks a job as the cluster will read it, and writes down what to ask for."""
    folder = Path(job.working_dir).expanduser().resolve()
    if not folder.is_dir():
        raise ConfigError(f"working_dir={job.working_dir}: no such folder; name the one that holds meamtm and configs")
    address = find_address(job.address)
    shared = is_this_machine(address) if job.shares_files is None else job.shares_files
    home = job.home or (str(folder) if shared else None)
    if home is not None and not home.startswith(("/", "~")):
        raise ConfigError(f"home={home} is relative, so it would lie in the copy that Ray deletes; write it from / on")
    with chdir(folder):
        words, env = _pack_words(job, home, shared) if job.kind == "pack" else _run_words(job, home, shared)
    if job.kind in WITH_SEEDS:
        words += ["--seeds", str(job.seeds)]
    assert job.kind is not None, "JobConfig has checked it"
    python = job.python or (sys.executable if shared else "python")
    return Submission(
        id=f"{job.name}-{datetime.now().astimezone():%Y%m%d-%H%M%S}-{secrets.token_hex(3)}",
        address=address,
        # Quoted word by word: a value is data, whatever a shell would make of it.
        entrypoint=shlex.join([python, "-m", "jobs.run", job.kind, *words]),
        runtime_env={
            "working_dir": str(folder),
            "excludes": list(job.excludes),
            "env_vars": _environment(job) | {JOB_COMMIT: commit_of(folder)} | env,
        },
        cpus=job.cpus,
        gpus=job.gpus,
    )


def make_word(key: str, value: str | None) -> str:
    """Writes KEY=VALUE so that reading it as YAML gives the same value back."""
    return f"{key}={yaml.safe_dump([value], default_flow_style=True, width=1_000_000).strip()[1:-1]}"


def conceal(text: str, env: Mapping[str, str]) -> str:
    """Replaces passwords in URIs, and the values of variables whose names sound secret, by ***."""
    for name, value in env.items():
        if value and SECRET.search(name) and not COMMON.fullmatch(value):
            text = text.replace(value, "***")
    return hide_password(text)


def _pack_words(job: JobConfig, home: str | None, shared: bool) -> tuple[list[str], dict[str, str]]:
    assert job.source is not None
    assert job.out is not None
    if is_uri(job.source):
        raise ConfigError(f"source={job.source} is a URI, and sounds are read from folders; name one that nodes see")
    source = _there("source", job.source, home)
    if shared and not Path(source).expanduser().exists():
        raise ConfigError(f"source={job.source}: no such folder; name one that holds sounds")
    words = [source, _there("out", job.out, home)]
    return words + (["--manifest", _there("manifest", job.manifest, home)] if job.manifest else []), {}


def _run_words(job: JobConfig, home: str | None, shared: bool) -> tuple[list[str], dict[str, str]]:
    """Reads the run or study as it stands here, and adds the changes that make it mean the same there."""
    assert job.config is not None
    _check_copied("config", job.config, job)
    run, paths = _read(job)
    changes: dict[str, str | None] = {
        key: there for key, here in paths.items() if (there := _there(key, here, home)) != here
    }
    # A job belongs to the cluster that it was given to, and its MLflow is named by the environment.
    changes |= {"scale.address": None} if run.scale.address is not None else {}
    changes |= {"tracking.uri": None} if run.tracking.uri is not None else {}
    kept = [word for word in job.changes if word.partition("=")[0].removeprefix("set.") not in changes]
    file = str(Path(job.config).resolve().relative_to(Path.cwd()))
    words = [file, *kept, *(make_word(key, value) for key, value in changes.items())]
    return words, _tracking(job, run.tracking, shared)


def _read(job: JobConfig) -> tuple[RunConfig, dict[str, str]]:
    """Checks a run or study; returns the run, or the one that trials start from, and the paths by their keys."""
    assert job.config is not None
    if job.kind in ("tune", "nested"):
        plan = load_plan(job.config, job.changes)
        if plan.config.base is not None:
            _check_copied("base", plan.config.base, job)
        run, paths = plan.base, {"studies_dir": plan.config.studies_dir}
    else:
        run, paths = load(job.config, parse_changes(job.changes)), {}
    if (weights := run.encoder.pretrained_path) is not None:
        paths["encoder.pretrained"] = str(weights)
    if run.distill.teacher != "none":
        paths["distill.teacher"] = run.distill.teacher
    return run, {"data.path": run.data.path, "data.cache_dir": run.data.cache_dir, "runs_dir": run.runs_dir, **paths}


def _check_copied(key: str, file: str, job: JobConfig) -> None:
    """Refuses a file that the copy of the working folder will lack, by Ray's own reading of the patterns."""
    path = Path(file).resolve()
    if not path.is_relative_to(Path.cwd()):
        raise ConfigError(f"{key}={file} lies outside working_dir={job.working_dir} and is not copied; move it")
    if not path.exists():  # which is told when it is read
        return
    from ray._private.ray_constants import RAY_RUNTIME_ENV_IGNORE_GITIGNORE
    from ray._private.runtime_env.packaging import _get_excludes, get_excludes_from_ignore_files

    reads_gitignore = os.environ.get(RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1"
    lists = get_excludes_from_ignore_files(Path.cwd(), reads_gitignore, logging.getLogger(__name__))
    if any(leaves_out(path) for leaves_out in (_get_excludes(Path.cwd(), list(job.excludes)), *lists)):
        raise ConfigError(
            f"{key}={file}: excludes or .gitignore keep it from being copied to the cluster; copy it to another "
            f"folder, such as configs"
        )


def _there(key: str, path: str, home: str | None) -> str:
    """Names a path so that it means the same in the job's copy of the working folder."""
    if is_uri(path) or path.startswith(("/", "~")):
        return path
    if home is None:
        raise ConfigError(
            f"{key}={path} is relative, and the cluster does not see this folder; give an absolute path "
            f"{'or URI ' if key == 'data.path' else ''}that its nodes see, or set home"
        )
    return str(PurePosixPath(home) / path)


def _environment(job: JobConfig) -> dict[str, str]:
    """Collects the job's environment; a null value is taken from this process."""
    env = {
        "PYTHONUNBUFFERED": "1",
        JOB_HOLDS["CPU"]: f"{job.cpus:g}",
        JOB_HOLDS["GPU"]: f"{job.gpus:g}",
        # A stopped job gets what Ctrl-C is on a terminal, where every command ends its MLflow runs. Ray's own choice,
        # SIGTERM, is taken over by ray.init(), which prints a stack trace and leaves.
        "RAY_JOB_STOP_SIGNAL": "SIGINT",
        "RAY_JOB_STOP_WAIT_TIME_S": str(job.stop_wait_s),
    }
    for key, value in job.env.items():
        found = os.environ.get(key) if value is None else value
        if found is None:
            raise ConfigError(
                f"env.{key}=null takes its value from here, where {key} is not set; export it or give one"
            )
        env[key] = found
    return env


def _tracking(job: JobConfig, tracking: TrackingConfig, shared: bool) -> dict[str, str]:
    """Names the MLflow that the job reports to, absolutely."""
    if not tracking.mlflow:
        return {}
    given = job.tracking_uri or tracking.uri or _environment(job).get(MLFLOW)
    uri = resolve_uri(tracking.model_copy(update={"uri": given}))
    if not shared and uri.startswith("sqlite"):
        raise ConfigError(
            f"tracking_uri={hide_password(uri)} is a file here, which the cluster does not see; "
            f"start `mlflow server` and give its http(s) address"
        )
    return {MLFLOW: uri}
