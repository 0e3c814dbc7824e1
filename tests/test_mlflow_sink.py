"""A real SQLite store has every run as it was, whoever wrote to it, wherever, and however the run ended."""

import multiprocessing
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow_points import points_in, points_of

from meamtm.config import TrackingConfig
from meamtm.errors import ServiceError
from meamtm.tracking import (
    JsonLines,
    MLflowSink,
    Sinks,
    finish_orphans,
    open_sink,
    resolve_uri,
    run_id_in,
)
from meamtm.tracking.server import connect


@pytest.fixture
def uri(migrated: Path, tmp_path: Path) -> str:
    shutil.copyfile(migrated, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


def test_a_store_whose_first_process_is_killed_is_made_by_the_next(tmp_path: Path) -> None:
    """MLflow takes seconds to fill a new one, and opens none that is half full."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    script = "import sys; from meamtm.tracking.server import connect; connect(sys.argv[1])"
    process = subprocess.Popen([sys.executable, "-c", script, uri])
    while not any(path.stat().st_size for path in tmp_path.glob("*mlflow.db*")):
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(1.0)
    assert process.poll() is None
    process.kill()
    process.wait()
    assert [experiment.name for experiment in connect(uri).search_experiments()] == ["Default"]


def test_run_is_read_back_as_it_was_logged(uri: str, tmp_path: Path) -> None:
    with MLflowSink(uri, "study of owls", "run-1", parent_run_id="parent") as sink:
        sink.start(
            {"optim.lr": 3e-4, "data.valid_fold": None, "encoder.patch": [16, 16], "name": "run"}, {"digest": "abc"}
        )
        sink.log({"train/loss": 0.5, "f1/crying (baby)": 1}, 1)
        sink.log({"train/loss": 0.25}, 2)
        sink.tag({"outcome": "stopped early"})
        (tmp_path / "table.csv").write_text("a,b\n")
        sink.artifact(tmp_path / "table.csv", "figures")
        (tmp_path / "table.csv").unlink()  # the sink has its own copy
    assert sink.run_id is not None
    client = connect(uri)
    run = client.get_run(sink.run_id)
    assert run.data.params == {
        "optim.lr": "0.0003",
        "data.valid_fold": "null",
        "encoder.patch": "[16, 16]",
        "name": "run",
    }
    assert (
        run.data.tags.items() >= {"digest": "abc", "mlflow.parentRunId": "parent", "outcome": "stopped early"}.items()
    )
    assert points_of(uri, sink.run_id) == {
        ("train/loss", 1, 0.5),
        ("train/loss", 2, 0.25),
        ("f1/crying _baby_", 1, 1.0),
    }
    assert (run.info.status, run.info.run_name) == ("FINISHED", "run-1")
    assert client.get_experiment(run.info.experiment_id).name == "study of owls"
    [file] = client.list_artifacts(sink.run_id, "figures")
    assert file.path == "figures/table.csv"


def test_artifacts_lie_beside_the_database_wherever_the_worker_runs(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "worker").mkdir()
    monkeypatch.chdir(tmp_path / "worker")
    (tmp_path / "config.yaml").write_text("a: 1\n")
    with MLflowSink(uri, "e", "r") as sink:
        sink.start({}, {})
        sink.artifact(tmp_path / "config.yaml")
    assert list((tmp_path / "worker").iterdir()) == []
    [file] = (tmp_path / "mlartifacts").rglob("config.yaml")
    assert file.read_text() == "a: 1\n"


def test_hundreds_of_params_long_values_and_thousands_of_points_all_arrive(uri: str) -> None:
    params = {f"key.{number}": number for number in range(250)} | {"long": "x" * 9000}
    tags = {f"tag.{number}": "t" for number in range(150)}
    with MLflowSink(uri, "e", "r") as sink:
        sink.start(params, tags)
        for step in range(1, 701):
            sink.log({"a": step, "b": -step}, step)
    assert sink.run_id is not None
    data = connect(uri).get_run(sink.run_id).data
    assert data.params.keys() == params.keys()
    assert len(data.params["long"]) == 6000
    assert data.params["long"].endswith("x... (9000 characters)")
    assert data.tags.keys() >= tags.keys()
    assert points_of(uri, sink.run_id) == {
        (key, step, sign * step) for key, sign in (("a", 1), ("b", -1)) for step in range(1, 701)
    }


def test_folder_name_may_have_spaces_quotes_and_letters_of_any_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, migrated: Path
) -> None:
    folder = tmp_path / "Zoë's owls & 鷹 #1"
    folder.mkdir()
    shutil.copyfile(migrated, folder / "mlflow.db")
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (folder / "notes.txt").write_bytes(b"not UTF-8: \xff")
    with open_sink(TrackingConfig(experiment="owls/day & night"), folder / "run", "r") as sink:
        sink.start({}, {})
        sink.artifact(folder / "notes.txt")
    run_id = run_id_in(folder / "run")
    assert run_id is not None
    assert connect(resolve_uri(TrackingConfig())).get_run(run_id).info.status == "FINISHED"
    [file] = (folder / "mlartifacts").rglob("notes.txt")
    assert file.read_bytes() == b"not UTF-8: \xff"
    assert sorted(path.name for path in folder.iterdir()) == [
        "mlartifacts",
        "mlflow.db",
        "mlflow.db.lock",
        "notes.txt",
        "run",
    ]


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED"), (SystemExit, "KILLED")]
)
def test_exception_sets_the_true_final_state(uri: str, tmp_path: Path, error: type[BaseException], status: str) -> None:
    sink = MLflowSink(uri, "e", "r")

    def run() -> None:
        with Sinks(sink, JsonLines(tmp_path / "metrics.jsonl")) as sinks:
            sinks.start({}, {})
            sinks.log({"a": 1.0}, 1)
            raise error

    with pytest.raises(error):
        run()
    assert sink.run_id is not None
    assert connect(uri).get_run(sink.run_id).info.status == status
    assert points_of(uri, sink.run_id) == {("a", 1, 1.0)}


def test_run_whose_lines_cannot_be_written_does_not_stay_running(uri: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    sink = MLflowSink(uri, "e", "r")
    with pytest.raises(FileExistsError):
        Sinks(sink, JsonLines(tmp_path / "file" / "metrics.jsonl")).start({}, {})
    assert sink.run_id is not None
    assert connect(uri).get_run(sink.run_id).info.status == "FAILED"


def test_same_folder_continues_the_same_run_and_sends_what_never_arrived(uri: str, tmp_path: Path) -> None:
    tracking, folder = TrackingConfig(uri=uri), tmp_path / "run"
    with open_sink(tracking, folder, "r") as first:
        first.start({"optim.lr": 0.1, "scale.workers": 0}, {})
        first.log({"train/loss": 1.0}, 1)
    first_id = run_id_in(folder)
    assert first_id is not None
    assert run_id_in(folder, "http://another:5000") is None
    with (folder / "metrics.jsonl").open("a") as file:  # logged while no server answered, by a process that died
        file.write('{"step": 2, "time": 1.7e9, "train/loss": 0.5}\n{"step": 3, "time": 1.7e9, "train/loss": 0.4}\n{"st')
    with open_sink(tracking, folder, "r") as second:
        second.start({"optim.lr": 0.1, "scale.workers": 2, "new.key": 1}, {}, from_step=2)
        assert connect(uri).get_run(first_id).info.status == "RUNNING"
        second.log({"train/loss": 0.3}, 3)
    run = connect(uri).get_run(first_id)
    assert run_id_in(folder) == first_id
    assert (
        points_of(uri, first_id)
        == points_in(folder / "metrics.jsonl")
        == {("train/loss", 1, 1.0), ("train/loss", 2, 0.5), ("train/loss", 3, 0.3)}
    )
    assert run.data.params == {"optim.lr": "0.1", "scale.workers": "0", "new.key": "1"}
    assert run.data.tags["changed.scale.workers"] == "2"
    assert run.info.status == "FINISHED"


def test_point_that_a_resumed_run_measures_again_is_there_once(uri: str) -> None:
    with MLflowSink(uri, "e", "r") as first:
        first.start({}, {})
        for step in (1, 2, 3):
            first.log({"a": step / 7}, step)
    with MLflowSink(uri, "e", "r", run_id=first.run_id) as second:
        second.start({}, {}, from_step=1)
        for step in (2, 3, 4):
            second.log({"a": step / 7}, step)
    assert second.run_id == first.run_id
    assert second.run_id is not None
    assert points_of(uri, second.run_id) == {("a", step, step / 7) for step in (1, 2, 3, 4)}


def test_run_that_the_server_lost_is_begun_anew_with_a_warning(uri: str, caplog: pytest.LogCaptureFixture) -> None:
    with MLflowSink(uri, "e", "r", run_id="0" * 32) as sink:
        sink.start({}, {})
    assert sink.run_id not in (None, "0" * 32)
    assert f"does not know run {'0' * 32}" in caplog.text


def test_folder_without_mlflow_keeps_its_lines_only(tmp_path: Path) -> None:
    with open_sink(TrackingConfig(mlflow=False), tmp_path / "run", "r") as sink:
        sink.start({}, {})
        sink.log({"a": 1.0}, 1)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


def test_orphans_of_a_killed_study_are_ended_and_others_left_alone(uri: str, caplog: pytest.LogCaptureFixture) -> None:
    client = connect(uri)
    experiment_id = client.create_experiment("e")
    parent = client.create_run(experiment_id).info.run_id
    child, finished = (
        client.create_run(experiment_id, tags={"mlflow.parentRunId": parent}).info.run_id for _ in range(2)
    )
    stranger, named = (client.create_run(experiment_id).info.run_id for _ in range(2))
    client.set_terminated(finished, "FINISHED")
    assert finish_orphans(uri, [named, "0" * 32], parent_run_id=parent, status="KILLED") == 2
    assert f"run {'0' * 32} is not ended" in caplog.text
    ends = {run.info.run_id: run.info.status for run in client.search_runs([experiment_id])}
    assert ends == {parent: "RUNNING", child: "KILLED", finished: "FINISHED", stranger: "RUNNING", named: "KILLED"}
    assert client.get_run(child).info.end_time is not None


def test_password_reaches_neither_params_nor_tags_nor_artifacts(uri: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("tracking: {uri: 'http://me:s3cret@host'}\n")
    with MLflowSink(uri, "e", "r") as sink:
        sink.start({"tracking.uri": "http://me:s3cret@host"}, {"origin": "https://me:s3cret@git/x"})
        sink.artifact(tmp_path / "config.yaml")
    assert sink.run_id is not None
    data = connect(uri).get_run(sink.run_id).data
    assert data.params == {"tracking.uri": "http://***@host"}
    assert data.tags["origin"] == "https://***@git/x"
    [file] = (tmp_path / "mlartifacts").rglob("config.yaml")
    assert "s3cret" not in file.read_text()


def test_file_that_is_no_database_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "notes.db").write_text("milk, eggs, a new microphone\n" * 50)
    with pytest.raises(ServiceError, match=r"tracking.uri=sqlite:.*notes.db cannot be used .*tracking.mlflow=false"):
        connect(f"sqlite:///{tmp_path}/notes.db")


def test_database_in_a_place_that_cannot_be_is_an_error_within_seconds(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    began_s = time.monotonic()
    with pytest.raises(ServiceError, match=r"tracking.uri=sqlite:.*file/mlflow.db cannot be used"):
        connect(f"sqlite:///{tmp_path}/file/mlflow.db")
    assert time.monotonic() - began_s < 5


def test_deleted_experiment_is_an_error_that_names_the_key(uri: str) -> None:
    client = connect(uri)
    client.delete_experiment(client.create_experiment("old"))
    with pytest.raises(ServiceError, match=r"tracking.experiment=old was deleted on sqlite:.*; restore it there, or"):
        MLflowSink(uri, "old", "r").start({}, {})


def log_ten_steps(uri: str, number: int, gate: Any) -> None:
    gate.wait()
    with MLflowSink(uri, "shared", f"run-{number}") as sink:
        sink.start({"number": number}, {})
        for step in range(1, 11):
            sink.log({"a": number * 100 + step}, step)


def test_eight_processes_may_create_and_fill_one_fresh_database_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    uri, gate = f"sqlite:///{tmp_path}/mlflow.db", context.Barrier(8)
    processes = [context.Process(target=log_ten_steps, args=(uri, number, gate)) for number in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * 8
    client = connect(uri)
    experiment = client.get_experiment_by_name("shared")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(run.info.run_name or "" for run in runs) == [f"run-{number}" for number in range(8)]
    assert {run.info.status for run in runs} == {"FINISHED"}
    for run in runs:
        number = int(run.data.params["number"])
        assert points_of(uri, run.info.run_id) == {("a", step, number * 100 + step) for step in range(1, 11)}


CHATTER = """
import sys
from pathlib import Path
from meamtm.config import TrackingConfig
from meamtm.tracking import open_sink
with open_sink(TrackingConfig(uri=sys.argv[1]), Path("run"), "r") as sink:
    sink.start({"a": 1}, {})
    sink.log({"a": 1.0}, 1)
    sink.artifact(Path("run/metrics.jsonl"))
"""


def test_fresh_database_is_made_and_filled_without_a_word_on_the_screen(tmp_path: Path) -> None:
    words = [sys.executable, "-c", CHATTER, "sqlite:///mlflow.db"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""
    assert (tmp_path / "mlflow.db").exists()
