"""A real `mlflow server` on this machine: what is logged arrives, also when the server dies and returns."""

import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from command import meamtm_command
from mlflow_points import points_in, points_of
from tiny import TINY, tiny

from meamtm.config import TrackingConfig, flatten, run_folder, write_yaml
from meamtm.errors import ServiceError
from meamtm.tracking import (
    MLflowSink,
    finish_orphans,
    has_all,
    hide_password,
    open_sink,
    read_rows,
    run_id_in,
)
from meamtm.tracking.server import connect, is_away


class Server:
    """`mlflow server` on this machine, which can be killed and started again on the same port and store."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        store = f"sqlite:///{self.folder}/mlflow.db?timeout=60"  # as docs/operations.md says, and so is the variable
        words = f"-m mlflow server --backend-store-uri {store} --host 127.0.0.1 --workers 1"
        words += f" --artifacts-destination {self.folder}/artifacts --port {self.port}"
        environment = os.environ | {
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_SQLALCHEMYSTORE_MAX_OVERFLOW": "-1",
        }
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, *words.split()], stdout=log, stderr=log, env=environment, start_new_session=True
            )
        assert answers(f"{self.uri}/health"), (self.folder / "server.log").read_text()

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)  # its own session: the server and its workers
            self.process.wait()
            self.process = None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(url: str, wait_s: float = 60.0) -> bool:
    deadline_s = time.monotonic() + wait_s
    while time.monotonic() < deadline_s:
        try:
            return requests.get(url, timeout=1).ok
        except requests.ConnectionError:
            time.sleep(0.1)
    return False


@pytest.fixture(scope="module")
def one_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.kill()


@pytest.fixture
def server(one_server: Server) -> Server:
    """A running server; it takes seconds to start, so tests share it and may kill it."""
    if one_server.process is None:
        one_server.start()
    return one_server


@pytest.mark.slow
def test_server_has_everything_that_was_logged(
    server: Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    uri = server.uri.replace("://", "://me:s3cret@")
    with open_sink(TrackingConfig(uri=uri), tmp_path / "run", "r") as sink:
        sink.start({"optim.lr": 0.1}, {"signature": "0a1b"})
        for step in range(1, 6):
            sink.log({"train/loss": 1 / step, "valid/accuracy": step / 7}, step)
        (tmp_path / "table.csv").write_text("a,b\n")
        sink.artifact(tmp_path / "table.csv", "figures")
    run_id = run_id_in(tmp_path / "run", uri)
    assert run_id is not None
    run = connect(server.uri).get_run(run_id)
    assert (run.data.params, run.data.tags["signature"], run.info.status) == ({"optim.lr": "0.1"}, "0a1b", "FINISHED")
    assert points_of(server.uri, run_id) == points_in(tmp_path / "run" / "metrics.jsonl")
    [file] = server.folder.rglob("table.csv")
    assert file.read_text() == "a,b\n"
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_server_that_dies_and_returns_misses_no_point(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with open_sink(TrackingConfig(uri=server.uri), tmp_path / "run", "r") as sink:
        sink.start({}, {})
        for step in range(1, 101):
            began_s = time.monotonic()
            sink.log({"train/loss": 1 / step, "valid/accuracy": step / 100}, step)
            assert time.monotonic() - began_s < 0.1
            if step == 30:
                server.kill()
            time.sleep(0.01)
        server.start()
    run_id = run_id_in(tmp_path / "run")
    assert run_id is not None
    assert points_of(server.uri, run_id) == points_in(tmp_path / "run" / "metrics.jsonl")
    assert len(points_in(tmp_path / "run" / "metrics.jsonl")) == 200
    assert connect(server.uri).get_run(run_id).info.status == "FINISHED"
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) <= 1


def training(folder: Path, packed: Path, cache_dir: Path, uri: str, epochs: int) -> tuple[list[str], Path]:
    """The words of `meamtm train` for a run of so many epochs, and its folder."""
    run = tiny(
        packed, cache_dir, folder / "runs", {"tracking.mlflow": True, "tracking.uri": uri, "train.epochs": epochs}
    )
    write_yaml(folder / "run.yaml", flatten(run))
    return ["train", str(folder / "run.yaml")], run_folder(run)


def wait_for_rows(folder: Path, count: int) -> None:
    """Waits until a run has recorded so many more epochs."""
    goal, deadline_s = len(read_rows(folder / "metrics.jsonl")) + count, time.monotonic() + 60
    while len(read_rows(folder / "metrics.jsonl")) < goal:
        assert time.monotonic() < deadline_s
        time.sleep(0.1)


@pytest.mark.slow
def test_run_through_an_outage_of_thirty_seconds_has_every_point_once(
    server: Server, packed: Path, cache_dir: Path, tmp_path: Path
) -> None:
    words, folder = training(tmp_path, packed, cache_dir, server.uri, epochs=100_000)
    process = subprocess.Popen([sys.executable, "-m", "meamtm.cli", *words], stderr=subprocess.PIPE, text=True)
    try:
        wait_for_rows(folder, 10)
        server.kill()
        for _ in range(6):
            wait_for_rows(folder, 1)
            time.sleep(5)
        wait_for_rows(folder, 1)  # training never paused
        server.start()
        wait_for_rows(folder, 10)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1
    assert said.count("does not answer") == 1
    assert re.search(rf"MLflow at tracking.uri={server.uri} does not answer \(connection \w+\); the run goes", said)
    run_id = run_id_in(folder, server.uri)
    assert run_id is not None
    points = points_in(folder / "metrics.jsonl")
    assert len(points) > 100
    assert points_of(server.uri, run_id) == points
    assert connect(server.uri).get_run(run_id).info.status == "KILLED"
    assert has_all(folder, server.uri, "KILLED")
    assert not has_all(folder, server.uri), "which is no finished run"


@pytest.mark.slow
def test_run_that_ended_while_the_server_was_away_is_sent_by_the_same_command(
    server: Server, packed: Path, cache_dir: Path, tmp_path: Path
) -> None:
    """Its process was killed as well; what was not sent is on the disk alone."""
    words, folder = training(tmp_path, packed, cache_dir, server.uri, epochs=40)
    process = subprocess.Popen([sys.executable, "-m", "meamtm.cli", *words], stderr=subprocess.DEVNULL)
    try:
        wait_for_rows(folder, 3)
        server.kill()
        deadline_s = time.monotonic() + 60
        while not (folder / "test" / "metrics.json").exists():  # the last thing that a run makes
            assert time.monotonic() < deadline_s
            time.sleep(0.1)
    finally:
        process.kill()
        process.wait()
    away = meamtm_command(*words)
    assert away.code == 0, "a finished run is finished, with or without a server"
    assert "this run is done" in away.out
    assert "which the same command sends later" in away.err
    server.start()
    assert not has_all(folder, server.uri)
    assert meamtm_command(*words).code == 0
    run_id = run_id_in(folder, server.uri)
    assert run_id is not None
    assert points_of(server.uri, run_id) == points_in(folder / "metrics.jsonl")
    client = connect(server.uri)
    assert client.get_run(run_id).info.status == "FINISHED"
    assert {file.path for file in client.list_artifacts(run_id)} == {"config.yaml", "curves.png", "test"}
    assert has_all(folder, server.uri)
    server.kill()
    assert meamtm_command(*words).err == "", "what is sent needs no server any more"


CROWD = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Lock
from meamtm.config import TrackingConfig
from meamtm.tracking import open_sink
uri, folder, first, count = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
one_by_one, together = Lock(), Barrier(count, timeout=600)
def run(number):
    with open_sink(TrackingConfig(uri=uri, experiment="crowd"), folder / f"{number}", f"{number}") as sink:
        with one_by_one:
            sink.start({"number": number}, {"kind": "crowd"})
        together.wait()
        for step in range(1, 21):
            sink.log({"train/loss": number + step, "valid/accuracy": step / number}, step)
with ThreadPoolExecutor(count) as pool:
    list(pool.map(run, range(first, first + count)))
"""


@pytest.mark.slow
@pytest.mark.timeout(800)
def test_two_hundred_runs_at_once_all_arrive_and_no_lock_is_heard_of(server: Server, tmp_path: Path) -> None:
    """At a server whose store is one SQLite file, from four processes; on a slow machine it may miss an answer's time
    limit, and a run then says that what it logs is kept."""
    words = [sys.executable, "-c", CROWD, server.uri, str(tmp_path)]
    crowd = [
        subprocess.Popen([*words, str(first), "50"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for first in (1, 51, 101, 151)
    ]
    said = [line for process in crowd for line in process.communicate()[0].splitlines()]
    assert [line for line in said if "(timed out); the run goes on, and what it logs is kept" not in line] == []
    for number in range(1, 201):
        assert has_all(tmp_path / str(number), server.uri)
    for number in range(1, 201, 20):
        run_id = run_id_in(tmp_path / str(number), server.uri)
        assert run_id is not None
        assert points_of(server.uri, run_id) == points_in(tmp_path / str(number) / "metrics.jsonl")
    assert "database is locked" not in (server.folder / "server.log").read_text()


@pytest.mark.slow
def test_server_that_stays_away_costs_a_bounded_wait_and_a_count(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    sink = MLflowSink(server.uri, "e", "r", close_wait_s=1.0)
    sink.start({}, {})
    time.sleep(0.5)  # the start is delivered
    server.kill()
    for step in (1, 2, 3):
        sink.log({"a": step, "b": step}, step)
    began_s = time.monotonic()
    sink.close()
    assert time.monotonic() - began_s < 3
    assert f"did not take the last 6 points of run {sink.run_id}, which it shows as RUNNING" in caplog.text
    assert finish_orphans(server.uri, [sink.run_id or ""]) == 0
    assert "runs may be left RUNNING: tracking.uri=" in caplog.text
    assert finish_orphans(f"sqlite:///{server.folder}/mlflow.db", [sink.run_id or ""]) == 1


@pytest.mark.slow
def test_server_whose_artifact_store_fails_has_all_but_files(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    artifacts, folder = server.folder / "artifacts", tmp_path / "run"
    if artifacts.exists():
        artifacts.rename(tmp_path / "aside")
    artifacts.touch()  # a file, where the server wants a folder
    folder.mkdir()
    (tmp_path / "table.csv").write_text("a,b\n")
    for num_lost in (1, 0):
        sink = MLflowSink(server.uri, "e", "r", folder=folder, close_wait_s=3.0)
        sink.start({}, {})
        sink.artifact(tmp_path / "table.csv")
        sink.log({"a": 1.0}, 1)
        sink.close()
        client = connect(server.uri)
        assert client.get_run(sink.run_id or "").info.status == "FINISHED"
        assert points_of(server.uri, sink.run_id or "") == {("a", 1, 1.0)}
        assert has_all(folder, server.uri) == (num_lost == 0)
        lost = f"did not take 1 of the 1 files of run {sink.run_id}; the same command sends them"
        assert (lost in caplog.text) == (num_lost == 1)
        assert ("does not answer (too many 500 error responses)" in caplog.text) == (num_lost == 1)
        if num_lost:
            artifacts.unlink()
            caplog.clear()
    assert [file.path for file in client.list_artifacts(sink.run_id or "")] == ["table.csv"]


def test_server_that_does_not_answer_is_one_clear_line_within_ten_seconds() -> None:
    uri = f"http://me:s3cret@127.0.0.1:{free_port()}"
    began_s = time.monotonic()
    with pytest.raises(ServiceError) as error:
        MLflowSink(uri, "e", "r").start({}, {})
    assert time.monotonic() - began_s < 10
    assert str(error.value) == (
        f"tracking.uri={hide_password(uri)} does not answer (connection refused); "
        "start the server or correct tracking.uri, or go without by tracking.mlflow=false"
    )
    assert error.value.__suppress_context__  # MLflow's own error has the password in it


def test_database_server_that_does_not_answer_is_an_error_within_ten_seconds_too() -> None:
    began_s = time.monotonic()
    with pytest.raises(ServiceError, match=r"tracking.uri=postgresql://\*\*\*@127.0.0.1:\d+/db does not answer"):
        connect(f"postgresql://me:s3cret@127.0.0.1:{free_port()}/db")
    assert time.monotonic() - began_s < 10


def test_server_that_accepts_and_stays_silent_is_an_error_within_ten_seconds() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        began_s = time.monotonic()
        with pytest.raises(ServiceError, match=r"tracking.uri=http://127.* does not answer \(.*timed out"):
            connect(f"http://127.0.0.1:{silent.getsockname()[1]}")
    assert time.monotonic() - began_s < 10


def test_server_of_something_else_is_an_error_that_says_so(tmp_path: Path) -> None:
    port = free_port()
    other = subprocess.Popen(
        [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert answers(f"http://127.0.0.1:{port}/")
        with pytest.raises(ServiceError, match=r"tracking.uri=http://127.* is not an MLflow server; correct it"):
            connect(f"http://127.0.0.1:{port}")
    finally:
        other.kill()
        other.wait()


def test_errors_of_a_network_pass_and_refusals_do_not() -> None:
    assert is_away(ConnectionRefusedError())
    assert is_away(TimeoutError())
    assert not is_away(PermissionError())
    assert not is_away(ValueError())


@pytest.mark.slow
def test_planted_password_is_nowhere(
    server: Server, packed: Path, cache_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Neither in a file of the run, of MLflow or of its log, nor on the screen."""
    uri = server.uri.replace("://", "://me:pl4nted@")
    places = {"data.path": str(packed), "data.cache_dir": str(cache_dir), "runs_dir": str(tmp_path / "runs")}
    write_yaml(tmp_path / "run.yaml", {**TINY, **places, "tracking.mlflow": True, "train.epochs": 2})
    result = meamtm_command("train", tmp_path / "run.yaml", f"tracking.uri={uri}")
    assert result.code == 0
    [run_folder] = (tmp_path / "runs").iterdir()
    assert connect(server.uri).get_run(run_id_in(run_folder, uri) or "").info.status == "FINISHED"
    files = [path for folder in (tmp_path, server.folder) for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 15
    assert [path for path in files if b"pl4nted" in path.read_bytes()] == []
    assert "pl4nted" not in "".join((result.out, result.err, *capfd.readouterr()))
