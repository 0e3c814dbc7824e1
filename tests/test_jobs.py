"""A job file becomes exactly the command that was meant, and a real cluster with token authentication runs it."""

import json
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit
from zipfile import ZipFile

import pytest
import ray
import requests
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from mlflow.entities import Run
from tiny import TINY

from jobs.__main__ import main, same_cluster
from jobs.config import DEFAULT_ADDRESS, JobConfig, load_job
from jobs.spec import Submission, conceal, find_address, is_this_machine, make_word, prepare
from meamtm.config import build, parse_changes
from meamtm.data.pack import read_card
from meamtm.errors import ConfigError, ServiceError
from meamtm.tracking import commit_of, read_rows
from meamtm.tracking.server import connect as connect_mlflow
from meamtm.training.checkpoint import newest, read_record

ROOT = Path(__file__).parents[1]
REMOTE = "http://ray.example:8265"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(key, raising=False)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a run, a study and sounds, which the test stands in."""
    (tmp_path / "run.yaml").write_text("data: {path: data/set}\n")
    (tmp_path / "study.yaml").write_text(
        "base: run.yaml\nset: {data.valid_fold: 2}\nspace: {optim.lr: {log_uniform: [1e-4, 1e-2]}}\n"
    )
    (tmp_path / "sounds").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def job(**settings: object) -> JobConfig:
    return build(JobConfig, settings)


def free_port() -> int:
    with closing(socket.socket()) as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


# What the cluster is asked to do


@pytest.mark.parametrize("path", sorted((ROOT / "configs/jobs").glob("*.yaml")), ids=lambda path: path.name)
def test_a_shipped_job_opens_with_its_command_and_is_valid(path: Path) -> None:
    assert path.read_text().startswith(f"# python -m jobs submit configs/jobs/{path.name}")
    loaded = load_job(path)
    assert loaded.name == path.stem
    assert loaded.config is None or (ROOT / loaded.config).is_file()


def test_words_of_the_job_change_it_and_all_others_reach_the_run(project: Path) -> None:
    (project / "job.yaml").write_text(
        "kind: train\nconfig: run.yaml\nchanges: [train.seed=3]\nenv: {OMP_NUM_THREADS: 1, A: true, B: 1.10}\n"
    )
    words = ["name=night", "optim.lr=3e-4", "env.LANG=C", "train.epochs=2"]
    loaded = load_job("job.yaml", words)
    assert loaded.name == "night"
    assert loaded.env == {"OMP_NUM_THREADS": "1", "A": "true", "B": "1.10", "LANG": "C"}
    assert loaded.changes == ("train.seed=3", "optim.lr=3e-4", "train.epochs=2")


@given(st.text(min_size=1).filter(lambda text: "\0" not in text))
@example("://")
def test_every_word_reaches_the_command_as_it_was_written(text: str) -> None:
    submission = prepare(job(kind="pack", source=f"/{text}", out=f"/{text}", address=REMOTE))
    assert shlex.split(submission.entrypoint) == ["python", "-m", "jobs.run", "pack", f"/{text}", f"/{text}"]


def test_a_shell_runs_nothing_that_hides_in_a_value(tmp_path: Path) -> None:
    spiteful = f"/x; touch {tmp_path}/pwned $(touch {tmp_path}/pwned) `touch {tmp_path}/pwned` 'x"
    submission = prepare(job(kind="pack", source="/s", out=spiteful, address=REMOTE, python="echo"))
    said = subprocess.run(submission.entrypoint, shell=True, capture_output=True, text=True, check=True).stdout  # noqa: S602
    assert said == f"-m jobs.run pack /s {spiteful}\n"
    assert not (tmp_path / "pwned").exists()


@given(st.text() | st.none())
def test_an_added_word_reads_back_as_its_value(value: str | None) -> None:
    assert parse_changes([make_word("data.path", value)]) == {"data.path": value}


def test_relative_paths_mean_the_submitters_folder_on_a_cluster_of_this_machine(project: Path) -> None:
    submission = prepare(job(kind="train", config="run.yaml", changes=["train.epochs=2"]))
    words = shlex.split(submission.entrypoint)
    assert words[:6] == [sys.executable, "-m", "jobs.run", "train", "run.yaml", "train.epochs=2"]
    assert words[6:] == [f"data.path={project}/data/set", f"runs_dir={project}/runs"]
    env = submission.runtime_env["env_vars"]
    assert env["MLFLOW_TRACKING_URI"] == f"sqlite:///{project}/mlflow.db"
    assert env["RAY_JOB_STOP_SIGNAL"] == "SIGINT"
    assert env["RAY_JOB_STOP_WAIT_TIME_S"] == "30"
    assert env["MEAMTM_JOB_COMMIT"] == "unknown"
    assert prepare(job(kind="train", config="configs/esc10.yaml", working_dir=str(ROOT))).runtime_env["env_vars"][
        "MEAMTM_JOB_COMMIT"
    ] == commit_of(ROOT)


def test_a_studys_folder_is_the_submitters_too(project: Path) -> None:
    words = shlex.split(prepare(job(kind="tune", config="study.yaml", changes=["trials=4"])).entrypoint)
    assert f"studies_dir={project}/studies" in words
    assert f"data.path={project}/data/set" in words


def test_weights_to_begin_with_and_teachers_are_found_from_the_job_too(project: Path) -> None:
    changes = ["encoder.pretrained=weights/ast.pth", "distill.teacher=runs/esc10-*"]
    words = shlex.split(prepare(job(kind="train", config="run.yaml", changes=changes)).entrypoint)
    assert f"encoder.pretrained={project}/weights/ast.pth" in words
    assert f"distill.teacher={project}/runs/esc10-*" in words
    assert not set(changes) & set(words)
    named = shlex.split(
        prepare(job(kind="train", config="run.yaml", changes=["encoder.pretrained=deit_tiny_patch16_224"])).entrypoint
    )
    assert "encoder.pretrained=deit_tiny_patch16_224" in named


def test_a_nested_study_is_told_its_seeds(project: Path) -> None:
    words = shlex.split(prepare(job(kind="nested", config="study.yaml", seeds=3)).entrypoint)
    assert words[1:5] == ["-m", "jobs.run", "nested", "study.yaml"]
    assert words[-2:] == ["--seeds", "3"]


def test_a_nested_study_is_what_the_entry_point_runs(project: Path) -> None:
    command = [sys.executable, "-m", "jobs.run", "nested", "study.yaml", "--folds", "one"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=env)
    assert (done.returncode, done.stderr) == (2, "tune: --folds=one: not whole numbers; write them as 1,2\n")


def test_paths_start_from_home_on_another_cluster(project: Path) -> None:
    settings = {"kind": "train", "config": "run.yaml", "address": REMOTE, "tracking_uri": "http://mlflow:5000"}
    words = shlex.split(prepare(job(**settings, home="/shared")).entrypoint)
    assert words == [
        "python",
        "-m",
        "jobs.run",
        "train",
        "run.yaml",
        "data.path=/shared/data/set",
        "runs_dir=/shared/runs",
    ]
    with pytest.raises(ConfigError, match=r"data.path=data/set is relative, .* absolute path or URI .* set home"):
        prepare(job(**settings))


def test_a_database_file_is_refused_for_another_cluster(project: Path) -> None:
    settings = {"kind": "train", "config": "run.yaml", "home": "/shared"}
    with pytest.raises(ConfigError, match=r"tracking_uri=sqlite:///.*mlflow.db is a file here, .*`mlflow server`"):
        prepare(job(**settings, address=REMOTE))
    with pytest.raises(ConfigError, match=r"tracking_uri=sqlite:"):
        prepare(job(**settings, shares_files=False))
    assert "MLFLOW_TRACKING_URI" in prepare(job(**settings, shares_files=True)).runtime_env["env_vars"]


def test_a_job_stays_on_its_cluster_and_its_trackers_password_off_the_command_line(project: Path) -> None:
    uri = "http://me:hunter2@mlflow.example:5000"
    changes = [f"tracking.uri={uri}", "scale.address=10.0.0.1:6379"]
    submission = prepare(job(kind="train", config="run.yaml", changes=changes))
    words = shlex.split(submission.entrypoint)
    assert "tracking.uri=null" in words
    assert "scale.address=null" in words
    assert "hunter2" not in submission.entrypoint
    assert submission.runtime_env["env_vars"]["MLFLOW_TRACKING_URI"] == uri


def test_a_job_file_may_name_mlflow_as_a_variable_and_a_job_says_what_it_holds(project: Path) -> None:
    uri = "http://mlflow:5000"
    settings = {"kind": "train", "config": "run.yaml", "env": {"MLFLOW_TRACKING_URI": uri}}
    for place in ({"cpus": 1, "gpus": 0.5}, {"address": REMOTE, "home": "/shared"}):
        env = prepare(job(**settings, **place)).runtime_env["env_vars"]
        assert env["MLFLOW_TRACKING_URI"] == uri
        assert (float(env["MEAMTM_JOB_CPUS"]), float(env["MEAMTM_JOB_GPUS"])) == tuple(
            place.get(key, 0) for key in ("cpus", "gpus")
        )


def test_ids_are_readable_and_unique(project: Path) -> None:
    ids = {prepare(job(kind="pack", name="sounds", source="sounds", out="out")).id for _ in range(50)}
    assert len(ids) == 50
    assert all(re.fullmatch(r"sounds-\d{8}-\d{6}-[0-9a-f]{6}", job_id) for job_id in ids)


def test_a_null_variable_is_taken_from_here(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "abc")
    wanted = job(kind="pack", source="sounds", out="out", env={"MLFLOW_TRACKING_TOKEN": None})
    assert prepare(wanted).runtime_env["env_vars"]["MLFLOW_TRACKING_TOKEN"] == "abc"  # noqa: S105
    monkeypatch.delenv("MLFLOW_TRACKING_TOKEN")
    with pytest.raises(ConfigError, match=r"env.MLFLOW_TRACKING_TOKEN=null .* not set; export it"):
        prepare(wanted)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"kind=null: a job is of a kind; add a line kind: train"),
        (
            {"kind": "trian", "config": "run.yaml"},
            r"kind='trian': input should be 'train', 'crossval', 'tune', 'nested' or 'pack'",
        ),
        ({"kind": "train", "config": "run.yaml", "seeds": 3}, r"seeds=3: kind=train does not use it; leave it out"),
        ({"kind": "train"}, r"config=null: kind=train needs it; add a line config: PATH"),
        ({"kind": "pack", "source": "sounds"}, r"out=null: kind=pack needs it"),
        (
            {"kind": "pack", "source": "a", "out": "b", "config": "run.yaml"},
            r"config='run.yaml': kind=pack does not use it",
        ),
        ({"kind": "train", "config": "run.yaml", "cpu": 1}, r"cpu=1: no such key; did you mean cpus\?"),
        ({"kind": "train", "config": "run.yaml", "name": "a b"}, r"name='a b': string should match"),
        ({"kind": "train", "config": "run.yaml", "cpus": -1}, r"cpus=-1: input should be greater than or equal to 0"),
        ({"kind": "train", "config": "run.yaml", "stop_wait_s": 0}, r"stop_wait_s=0: input should be greater"),
        ({"kind": "train", "config": "run.yaml", "address": "auto"}, r"address='auto' is not an http\(s\) address"),
        (
            {"kind": "train", "config": "run.yaml", "address": "ray://me:hunter2@head:10001"},
            r"address='ray://\*\*\*@head:10001' is not an http",
        ),
        (
            {"kind": "train", "config": "run.yaml", "tracking_uri": "http://me:hunter2@[h"},
            r"uri=http://\*\*\*@\[h: is no add",
        ),
        ({"kind": "train", "config": "none.yaml"}, r"none.yaml: no such file"),
        ({"kind": "train", "config": "../run.yaml"}, r"config=../run.yaml lies outside working_dir=."),
        ({"kind": "train", "config": "run.yaml", "changes": ["optim.rl=1"]}, r"optim.rl=1: no such key; did you mean"),
        ({"kind": "train", "config": "run.yaml", "changes": ["optim"]}, r"'optim' is not KEY=VALUE"),
        ({"kind": "tune", "config": "study.yaml", "changes": ["trails=3"]}, r"trails=3: no such key .* mean trials\?"),
        ({"kind": "pack", "source": "nowhere", "out": "b"}, r"source=nowhere: no such folder"),
        ({"kind": "pack", "source": "s3://a/b", "out": "b"}, r"source=s3://a/b is a URI, and sounds are read from fol"),
        ({"kind": "train", "config": "run.yaml", "home": "shared"}, r"home=shared is relative, so it would lie in"),
        ({"kind": "train", "config": "run.yaml", "working_dir": "nowhere"}, r"working_dir=nowhere: no such folder"),
    ],
)
def test_a_wrong_job_names_key_value_rule_and_remedy(project: Path, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(job(**settings))


def test_a_base_that_is_not_copied_is_refused(project: Path) -> None:
    study = yaml.safe_load((project / "study.yaml").read_text())
    for base, why in (("runs/x/config.yaml", "excludes or .gitignore keep it"), ("../base.yaml", "lies outside")):
        (project / base).resolve().parent.mkdir(parents=True, exist_ok=True)
        (project / base).write_text((project / "run.yaml").read_text())
        (project / "study.yaml").write_text(yaml.safe_dump({**study, "base": base}))
        with pytest.raises(ConfigError, match=rf"base={base}:? {why}"):
            prepare(job(kind="tune", config="study.yaml"))


@pytest.mark.parametrize(
    ("config", "ignored"), [("studies/x/best.yaml", ""), ("mine/best.yaml", "mine/\n"), (".venv/../runs/best.yaml", "")]
)
def test_a_config_that_is_not_copied_is_refused(project: Path, config: str, ignored: str) -> None:
    (project / ".gitignore").write_text(ignored)
    (project / ".venv").mkdir()
    (project / config).resolve().parent.mkdir(parents=True)
    (project / config).write_text((project / "run.yaml").read_text())
    with pytest.raises(ConfigError, match=rf"config={config}: excludes or .gitignore keep it from being copied"):
        prepare(job(kind="train", config=config))
    (project / "configs").mkdir(exist_ok=True)
    shutil.copy(project / config, project / "configs")
    assert "configs/best.yaml" in prepare(job(kind="train", config="configs/best.yaml")).entrypoint


def test_the_copy_leaves_out_data_but_no_package_of_that_name(project: Path) -> None:
    from ray._private.runtime_env.packaging import create_package

    sent = ("meamtm/data/pack.py", "configs/jobs/pack.yaml", "jobs/run.py")
    kept_here = ("data/esc10/card.json", "runs/x/config.yaml", ".venv/bin/python", "mlflow.db", "mlflow.db-wal")
    for path in (*sent, *kept_here):
        (project / path).parent.mkdir(parents=True, exist_ok=True)
        (project / path).write_text("x")
    archive = project.with_suffix(".zip")
    excludes = prepare(job(kind="train", config="run.yaml")).runtime_env["excludes"]
    create_package(str(project), archive, include_gitignore=True, excludes=excludes)
    names = ZipFile(archive).namelist()
    assert set(sent) <= set(names)
    assert not set(kept_here) & set(names)


def test_cluster_files_name_the_installed_ray() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    folder = ROOT / "jobs/cluster"
    cluster = list(yaml.safe_load_all((folder / "raycluster.yaml").read_text()))[1]
    own_cluster = yaml.safe_load((folder / "rayjob.yaml").read_text())
    assert cluster["spec"]["rayVersion"] == own_cluster["spec"]["rayClusterSpec"]["rayVersion"] == ray.__version__
    assert f"rayproject/ray:{ray.__version__}-py311" in (folder / "Dockerfile").read_text()
    study = load_job(ROOT / "configs/jobs/tune.yaml").config
    assert own_cluster["spec"]["entrypoint"].startswith(f"python -m jobs.run tune {study} ")
    validate_config(prepare_config(yaml.safe_load((folder / "machines.yaml").read_text())))


# Which cluster


def test_the_job_files_address_goes_before_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_address() == "http://127.0.0.1:8265"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert find_address() == "http://127.0.0.1:8265"
    monkeypatch.setenv("RAY_ADDRESS", "http://a:8265/")
    assert find_address() == "http://a:8265"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://b:8265")
    assert find_address() == "http://b:8265"
    assert find_address("http://c:8265") == "http://c:8265"


def test_a_printed_command_finds_the_same_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    assert same_cluster("logs", "j", DEFAULT_ADDRESS) == "python -m jobs logs j"
    assert same_cluster("stop", "j", "http://head:8265") == "python -m jobs stop j --address http://head:8265"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://head:8265")
    assert same_cluster("stop", "j", "http://head:8265") == "python -m jobs stop j"


def test_a_packed_set_is_written_to_a_folder() -> None:
    with pytest.raises(ConfigError, match=r"out='s3://b/c': files are written there, .* is no folder; name a folder"):
        job(kind="pack", source="a", out="s3://b/c")


def test_a_loopback_address_is_this_machine() -> None:
    assert all(map(is_this_machine, ("http://127.0.0.1:8265", "http://localhost:8265", "http://[::1]:8265")))
    assert not any(map(is_this_machine, ("http://10.0.0.1:8265", "http://localhost.example:8265")))


def test_secrets_are_not_printed() -> None:
    env = {"MLFLOW_TRACKING_TOKEN": "t0ken", "API_KEY": "k", "EMPTY_PASSWORD": "", "LANG": "C"}
    said = conceal("C: t0ken at http://me:hunter2@host/ by k", env)
    assert said == "C: *** at http://***@host/ by ***"
    common = {"TOKENIZERS_PARALLELISM": "false", "OMP_KEY_X": "1", "KEYBOARD": "loss", "WANDB_API_KEYS": "true"}
    line = "epoch 1  train/loss 0.1; mixing=false, true"
    assert conceal(line, common) == line


def test_help_is_quick_because_nothing_heavy_is_imported() -> None:
    check = "import sys, jobs.__main__; print(sorted({'ray', 'mlflow', 'torch', 'optuna'} & set(sys.modules)))"
    said = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said == "[]\n"


def test_a_mistake_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["jobs", "submit", "nowhere.yaml"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.err.startswith("jobs: nowhere.yaml: no such file;")
    assert said.err.count("\n") == 1
    assert said.out == ""


class Stranger(BaseHTTPRequestHandler):
    """A web server that is not Ray's."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"hello")

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Keeps the test's output clean."""


def test_an_address_where_nobody_listens_is_told_at_once() -> None:
    from jobs.submit import connect

    address = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(ServiceError, match=rf"{address} does not answer; .*`ray start --head`.*RAY_API_SERVER_ADDRESS"):
        connect(address)


def test_an_address_that_accepts_and_is_silent_is_told_within_ten_seconds() -> None:
    from jobs.submit import connect

    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        started_s = time.monotonic()
        with pytest.raises(ServiceError, match="does not answer"):
            connect(f"http://127.0.0.1:{server.getsockname()[1]}")
        assert time.monotonic() - started_s < 10


def test_a_web_server_that_is_not_rays_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from jobs.submit import connect

    server = HTTPServer(("127.0.0.1", 0), Stranger)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with closing(server.socket), pytest.raises(ServiceError, match="answers, but not as Ray's dashboard does"):
        connect(f"http://127.0.0.1:{server.server_port}")
    server.shutdown()


class Starting(BaseHTTPRequestHandler):
    """Answers as Ray's dashboard does while the agent of its node has not started, so many times."""

    refusals = 0

    def do_GET(self) -> None:
        self.answer(200, json.dumps({"ray_version": ray.__version__}))

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        if type(self).refusals:
            type(self).refusals -= 1
            self.answer(500, "No available agent to submit job, please try again later.")
        else:
            self.answer(200, json.dumps({"job_id": "a", "submission_id": "a"}))

    def answer(self, code: int, text: str) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Keeps the test's output clean."""


@pytest.mark.parametrize("refusals", [2, 1_000])
def test_a_cluster_that_has_just_started_is_asked_again_for_a_while(
    monkeypatch: pytest.MonkeyPatch, refusals: int
) -> None:
    import jobs.submit

    monkeypatch.setattr(jobs.submit, "AGENT_S", 3.0)
    monkeypatch.setattr(Starting, "refusals", refusals)
    server = HTTPServer(("127.0.0.1", 0), Starting)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    submission = Submission("a", address, "true", {}, 0, 0)
    with closing(server.socket):
        cluster = jobs.submit.connect(address)
        if refusals == 2:
            assert jobs.submit.submit(cluster, submission) == "a"
            assert Starting.refusals == 0
        else:
            with pytest.raises(
                ServiceError, match=rf"{address} takes no jobs after 3 s: .*--dashboard-agent-listen-po"
            ):
                jobs.submit.submit(cluster, submission)
    server.shutdown()


def test_a_log_that_breaks_off_is_not_written_twice() -> None:
    from jobs.submit import Once

    written: list[str] = []
    once = Once(written.append)
    for text in ("one\n", "two\n"):
        once(text)
    once.begin()  # a new connection sends everything again
    for text in ("one\ntw", "o\nthree\n"):
        once(text)
    assert "".join(written) == "one\ntwo\nthree\n"


def test_a_stop_request_interrupts_even_where_the_shell_ignored_it() -> None:
    program = """
import signal
signal.signal(signal.SIGINT, signal.SIG_IGN)  # as for what a shell starts in the background
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # as Ray does
from jobs.run import stop_as_ctrl_c
stop_as_ctrl_c()
try:
    print("ready", flush=True)
    signal.pause()
except KeyboardInterrupt:
    print("interrupted")
"""
    for number in (signal.SIGINT, signal.SIGTERM):
        with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            process.send_signal(number)
            assert process.communicate(timeout=20)[0] == "interrupted\n"


# A real cluster


@dataclass(frozen=True)
class Head:
    """A running head node that asks for a token, and an environment that holds it."""

    address: str
    folder: Path
    env: dict[str, str]

    def jobs(self, *words: object, **env: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "jobs", *map(str, words)]
        return subprocess.run(
            command, cwd=ROOT, env=self.env | env, capture_output=True, text=True, timeout=240, check=False
        )

    def runs(self) -> list[Run]:
        """All MLflow runs so far; none before there is a database."""
        if not (self.folder / "mlflow.db").exists():
            return []
        client = connect_mlflow(self.env["MLFLOW_TRACKING_URI"])
        return list(client.search_runs([experiment.experiment_id for experiment in client.search_experiments()]))


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    # Not pytest's own folder: Ray's socket names would grow longer than a socket's name may be.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / "token").write_text(secrets.token_hex(32))
        address = f"http://127.0.0.1:{free_port()}"
        env = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_"))}
        env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": f"{name}/token", "OMP_NUM_THREADS": "1"}
        env |= {"RAY_worker_niceness": "0"}  # as in tests/conftest.py
        env |= {"RAY_API_SERVER_ADDRESS": address, "MLFLOW_TRACKING_URI": f"sqlite:///{name}/mlflow.db"}
        options = {
            "node-ip-address": "127.0.0.1",
            "port": 0,
            "ray-client-server-port": free_port(),
            "dashboard-host": "127.0.0.1",
            "dashboard-port": urlsplit(address).port,
            "dashboard-agent-listen-port": 0,
            "num-cpus": 2,
            "num-gpus": 0,
            "object-store-memory": 100_000_000,
            "temp-dir": f"{name}/ray",
        }
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
        command += [f"--{key}={value}" for key, value in options.items()]
        with (folder / "head.log").open("w") as log:
            # A process group of its own, so that this cluster is ended and no other one on this machine.
            process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_for(lambda: answers(address) or process.poll() is not None, 90)
            assert process.poll() is None, (folder / "head.log").read_text()
            yield Head(address, folder, env)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def answers(address: str) -> bool:
    try:
        return requests.get(f"{address}/api/version", timeout=5).status_code == requests.codes.unauthorized
    except requests.ConnectionError:
        return False


def wait_for(condition: Callable[[], bool], limit_s: float) -> None:
    deadline_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline_s, f"nothing within {limit_s} s"
        time.sleep(0.3)


@pytest.mark.ray
def test_a_submitted_job_streams_its_log_and_succeeds(head: Head, sounds: Path) -> None:
    done = head.jobs("submit", "configs/jobs/pack.yaml", f"source={sounds}", f"out={head.folder}/packed")
    assert done.returncode == 0, done.stdout + done.stderr
    job_id = done.stderr.split()[1]
    assert f"jobs.run pack {sounds}" in done.stdout
    assert done.stdout.splitlines()[-1].startswith(f"{job_id} SUCCEEDED after")
    assert read_card(head.folder / "packed").num_clips == 100
    assert head.jobs("status", job_id).stdout.startswith(f"{job_id} SUCCEEDED")
    assert job_id in head.jobs("list").stdout
    assert "jobs.run pack" in head.jobs("logs", job_id).stdout


@pytest.mark.ray
def test_a_job_that_fails_says_why_and_exits_with_1(head: Head, sounds: Path) -> None:
    (head.folder / "empty").mkdir()
    done = head.jobs("submit", "configs/jobs/pack.yaml", f"source={head.folder}/empty", f"out={head.folder}/none")
    assert done.returncode == 1
    assert "FAILED" in done.stdout.splitlines()[-1]
    assert "Traceback" not in done.stdout
    told = head.jobs("status", done.stderr.split()[1])
    assert told.returncode == 1
    assert f"{head.folder}/empty" in told.stderr


@pytest.mark.ray
@pytest.mark.parametrize(
    ("env", "problem"),
    [
        ({"RAY_AUTH_TOKEN": "wrong"}, "the token was refused"),
        ({"RAY_AUTH_MODE": "disabled"}, "the token is missing"),
        ({"RAY_AUTH_TOKEN_PATH": "/nowhere"}, "no token found here"),
    ],
)
def test_a_wrong_or_missing_token_is_told_with_its_remedy(head: Head, env: dict[str, str], problem: str) -> None:
    done = head.jobs("list", **env)
    assert done.returncode == 2
    assert done.stderr.startswith(f"jobs: {head.address}: {problem}; the cluster asks for a token")
    assert "ray get-auth-token --generate" in done.stderr
    assert "RAY_AUTH_MODE=token" in done.stderr
    assert done.stderr.count("\n") == 1
    assert "wrong" not in done.stderr


@pytest.mark.ray
def test_an_unknown_job_is_told(head: Head) -> None:
    for command in (["logs", "x", "--follow"], ["stop", "x"]):
        done = head.jobs(*command)
        assert done.returncode == 2
        assert done.stderr == (
            f"jobs: {head.address}: no job of that ID (Job x does not exist); `python -m jobs list` names them\n"
        )


class NoWebSockets(BaseHTTPRequestHandler):
    """A proxy that passes plain requests on, as some do."""

    target = ""

    def do_GET(self) -> None:
        if "Upgrade" in self.headers:
            self.send_error(403)
            return
        answer = requests.get(self.target + self.path, headers=dict(self.headers.items()), timeout=30)
        self.send_response(answer.status_code)
        self.end_headers()
        self.wfile.write(answer.content)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Keeps the test's output clean."""


@pytest.mark.ray
def test_a_log_comes_through_a_proxy_without_websockets(head: Head) -> None:
    job_id = head.jobs("list").stdout.splitlines()[-1].split()[0]
    NoWebSockets.target = head.address
    server = ThreadingHTTPServer(("127.0.0.1", 0), NoWebSockets)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with closing(server.socket):
        done = head.jobs("logs", job_id, "--follow", "--address", f"http://127.0.0.1:{server.server_port}")
    server.shutdown()
    assert done.stdout.startswith(head.jobs("logs", job_id).stdout)
    assert job_id in done.stdout.splitlines()[-1]


@pytest.mark.ray
@pytest.mark.parametrize("job_id", ["", "../version"])
def test_what_is_no_id_of_a_job_is_told(head: Head, job_id: str) -> None:
    for words in (["status"], ["logs", "--follow"], ["stop"]):
        done = head.jobs(*words, job_id)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"jobs: {job_id!r}: is no ID of a job; `python -m jobs list` names them\n"


@pytest.mark.ray
def test_a_job_that_finds_no_room_says_what_it_waits_for(head: Head, sounds: Path) -> None:
    words = [
        "submit",
        "configs/jobs/pack.yaml",
        f"source={sounds}",
        f"out={head.folder}/never",
        "cpus=64",
        "name=large",
    ]
    job_id = head.jobs(*words, "--no-wait").stdout.strip()
    status = head.jobs("status", job_id)
    assert (status.returncode, status.stdout) == (0, f"{job_id} PENDING\n")
    assert "waiting for" in status.stderr
    command = [sys.executable, "-m", "jobs", "logs", job_id, "--follow"]
    with subprocess.Popen(command, cwd=ROOT, env=head.env, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith(f"{job_id} waits to begin: ")
        process.kill()


@pytest.mark.ray
def test_more_than_a_cluster_takes_is_told(head: Head, sounds: Path) -> None:
    big = head.folder / "big"
    big.mkdir()
    with (big / "data.bin").open("wb") as file:
        file.truncate(101 * 2**20)
    done = head.jobs("submit", "configs/jobs/pack.yaml", f"source={sounds}", "out=/x", f"working_dir={big}")
    assert done.returncode == 2
    said = done.stderr.splitlines()[-1]
    assert said.startswith("jobs: working_dir: its copy is larger than a cluster takes (100 MiB);")


TINY_RUN = [f"{key}={value}" for key, value in TINY.items() if not key.startswith(("tracking.", "train.epochs"))]
"""The words for what trains within a second."""


def small(head: Head, packed: Path) -> list[str]:
    """The smoke study on the tests' small sound set."""
    places = [f"studies_dir={head.folder}/studies", f"runs_dir={head.folder}/runs"]
    data = [f"data.path={packed}", f"data.cache_dir={head.folder}/cache", "data.clip_s=0.5", "mel.sample_rate_hz=8000"]
    return ["submit", "configs/jobs/tune-smoke.yaml", *places, *data, "max_concurrent=1"]


@pytest.mark.ray
def test_a_study_as_a_job_succeeds_and_is_seen_in_mlflow(head: Head, packed: Path) -> None:
    done = head.jobs(*small(head, packed))
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (head.folder / "studies").iterdir()
    assert (folder / "best.yaml").exists()
    assert folder.name in done.stdout
    runs = head.runs()
    (study,) = [run for run in runs if run.info.run_name == folder.name]
    assert len([run for run in runs if run.data.tags.get("mlflow.parentRunId") == study.info.run_id]) == 3
    assert {run.info.status for run in runs} == {"FINISHED"}
    has_commit = {run.data.tags["git_commit"] != "unknown" for run in runs}
    assert has_commit == {(ROOT / ".git").is_dir()}


@pytest.mark.ray
def test_a_stopped_study_leaves_no_run_running(head: Head, packed: Path) -> None:
    done = head.jobs(*small(head, packed), "name=long", "train.epochs=20000", "trials=4", "--no-wait")
    assert done.returncode == 0, done.stderr
    job_id = done.stderr.split()[1]
    assert done.stdout == f"{job_id}\n"
    assert f"python -m jobs logs {job_id} --follow" in done.stderr
    wait_for(
        lambda: any(run.info.status == "RUNNING" and "mlflow.parentRunId" in run.data.tags for run in head.runs()), 120
    )
    assert_goes_on_after_ctrl_c(head, job_id)
    stopped = head.jobs("stop", job_id)
    assert stopped.stdout.startswith(f"{job_id} STOPPED"), stopped.stdout + stopped.stderr
    states = [run.info.status for run in head.runs()]
    assert "RUNNING" not in states
    assert states.count("KILLED") >= 2  # the study and a trial


@pytest.mark.ray
def test_a_cross_validation_as_a_job_ends_with_its_table(head: Head, packed: Path) -> None:
    words = ["submit", "configs/jobs/crossval.yaml", "seeds=2", f"runs_dir={head.folder}/crossed", "name=crossed"]
    words += [*TINY_RUN, f"data.path={packed}", f"data.cache_dir={head.folder}/cache", "train.epochs=1"]
    done = head.jobs(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (head.folder / "crossed").glob("*-crossval-*")
    result = json.loads((folder / "crossval.json").read_text())
    assert {(row["fold"], row["seed"]) for row in result["rows"]} == {
        (fold, seed) for fold in range(1, 6) for seed in (0, 1)
    }
    assert f"test accuracy {result['figures']['crossval/accuracy_mean']:.4f} ± " in done.stdout


def assert_goes_on_after_ctrl_c(head: Head, job_id: str) -> None:
    command = [sys.executable, "-m", "jobs", "logs", job_id, "--follow"]
    with subprocess.Popen(
        command, cwd=ROOT, env=head.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert "Runtime env is setting up" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 1
    assert f"{job_id} goes on; python -m jobs logs {job_id} --follow" in said
    assert "Traceback" not in said
    assert head.jobs("status", job_id).stdout == f"{job_id} RUNNING\n"


@pytest.mark.ray
def test_a_job_that_is_killed_goes_on_when_it_is_submitted_again(head: Head, packed: Path) -> None:
    runs = head.folder / "killed"
    words = ["submit", "configs/jobs/train.yaml", *TINY_RUN, f"runs_dir={runs}", "name=killed", "train.epochs=20"]
    words += [f"data.path={packed}", f"data.cache_dir={head.folder}/cache"]
    job_id = head.jobs(*words, "--no-wait").stdout.strip()
    wait_for(lambda: any(runs.glob("*/epoch-*")), 120)
    (folder,) = runs.iterdir()
    os.kill(json.loads((folder / ".holder.json").read_text())["pid"], signal.SIGKILL)
    wait_for(lambda: f"{job_id} FAILED" in head.jobs("status", job_id).stdout, 60)
    assert 0 < read_record(newest(folder))["epoch"] < 20  # the kill may come before the record has a line of it
    done = head.jobs(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [row for row in read_rows(folder / "metrics.jsonl") if "train/loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 21))
    (run,) = [run for run in head.runs() if run.info.run_name == folder.name]
    assert run.info.status == "FINISHED"
