"""A run's record survives any crash, waits for whoever is away, and tells nobody's password."""

import json
import math
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meamtm.config import TrackingConfig
from meamtm.errors import ConfigError
from meamtm.tracking import (
    JOB_COMMIT,
    JsonLines,
    commit_of,
    commit_of_this_code,
    hide_password,
    how_to_open,
    read_rows,
    resolve_uri,
)
from meamtm.tracking.mailbox import Call, Mailbox, Point
from meamtm.tracking.sink import outcome


def loaded_by(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_importing_tracking_loads_neither_mlflow_nor_matplotlib() -> None:
    assert loaded_by("import meamtm.tracking").isdisjoint({"mlflow", "matplotlib", "torch", "ray"})
    assert "matplotlib" in loaded_by("import matplotlib")  # the check above can fail


def write_steps(path: Path, steps: Sequence[int], from_step: int = 0) -> None:
    lines = JsonLines(path)
    lines.start({}, {}, from_step)
    for step in steps:
        lines.log({"train/loss": 1 / step, "valid/accuracy": step / 10}, step)
    lines.close()


def without_time(path: Path) -> list[dict[str, float | int]]:
    return [{key: value for key, value in row.items() if key != "time"} for row in read_rows(path)]


def test_each_log_call_is_one_json_line_that_can_be_read_at_once(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "run" / "metrics.jsonl")
    lines.start({}, {})
    lines.log({"train/loss": 0.5, "epoch": 1}, 1)
    [line] = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    row = json.loads(line)
    assert abs(row.pop("time") - time.time()) < 60
    assert row == {"step": 1, "train/loss": 0.5, "epoch": 1}
    lines.close()


@given(cut=st.integers(0, 400), done=st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_resumed_file_equals_uninterrupted_file(tmp_path_factory: pytest.TempPathFactory, cut: int, done: int) -> None:
    folder = tmp_path_factory.mktemp("lines")
    write_steps(folder / "whole.jsonl", range(1, 7))
    write_steps(folder / "resumed.jsonl", range(1, 5))
    content = (folder / "resumed.jsonl").read_bytes()
    starts_of_next = [position + 1 for position, byte in enumerate(content) if byte == ord("\n")]
    (folder / "resumed.jsonl").write_bytes(content[: max(cut, starts_of_next[done - 1])])  # torn anywhere later
    write_steps(folder / "resumed.jsonl", range(done + 1, 7), from_step=done)
    assert without_time(folder / "resumed.jsonl") == without_time(folder / "whole.jsonl")


def test_new_run_in_an_old_folder_starts_an_empty_file(tmp_path: Path) -> None:
    write_steps(tmp_path / "metrics.jsonl", [1, 2, 3])
    write_steps(tmp_path / "metrics.jsonl", [1])
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1]


def test_line_on_its_way_is_left_out_and_a_damaged_one_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "a": 2.0}\n{"step": 2, "a": 1.\x00\n{"step": 3, "\xc3')
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 1, "a": 2.0}]
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}/metrics.jsonl: line 2 is damaged and is left out"
    ]


def test_values_that_are_not_finite_are_null_in_json_and_nan_again_when_read(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.start({}, {})
    lines.log({"valid/macro_f1": math.nan, "train/loss": math.inf}, 1)
    lines.close()
    assert '"valid/macro_f1": null, "train/loss": null' in (tmp_path / "metrics.jsonl").read_text()
    [row] = read_rows(tmp_path / "metrics.jsonl")
    assert math.isnan(row["valid/macro_f1"])
    assert math.isnan(row["train/loss"])


def test_file_that_is_not_there_has_no_rows(tmp_path: Path) -> None:
    assert read_rows(tmp_path / "metrics.jsonl") == []


def test_artifact_is_copied_beside_the_lines_once(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "run" / "metrics.jsonl")
    lines.start({}, {})
    (tmp_path / "table.csv").write_text("a,b\n")
    lines.artifact(tmp_path / "table.csv", "figures")
    lines.artifact(tmp_path / "run" / "figures" / "table.csv", "figures")  # already there
    lines.close()
    assert (tmp_path / "run" / "figures" / "table.csv").read_text() == "a,b\n"


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        (None, "FINISHED"),
        (ValueError, "FAILED"),
        (MemoryError, "FAILED"),
        (KeyboardInterrupt, "KILLED"),
        (SystemExit, "KILLED"),
    ],
)
def test_outcome_tells_how_a_run_ended(kind: type[BaseException] | None, status: str) -> None:
    assert outcome(kind) == status


@given(user=st.text(min_size=1), password=st.text(min_size=1))
def test_password_in_a_uri_is_never_shown(user: str, password: str) -> None:
    userinfo = f"{quote(user, safe='')}:{quote(password, safe='')}"
    assert hide_password(f"GET http://{userinfo}@host:5000/x failed") == "GET http://***@host:5000/x failed"


@given(password=st.text("abcXYZ019!#$%&()*+,-./:;<=>?@[]^_{|}~", min_size=1))
def test_password_that_should_have_been_quoted_is_not_shown_either(password: str) -> None:
    assert hide_password(f"postgresql://user:{password}@host/db") == "postgresql://***@host/db"


def test_password_in_a_query_is_not_shown() -> None:
    assert hide_password("postgresql://h/db?user=u&password=p4ss&x=1") == "postgresql://h/db?user=u&password=***&x=1"


@pytest.mark.parametrize(
    "text", ["http://host:5000/a?b=c", "sqlite:////data/mlflow.db", "mail to a@b", "s3://bucket/x"]
)
def test_text_without_password_is_left_as_it_is(text: str) -> None:
    assert hide_password(text) == text


def test_uri_comes_from_config_then_environment_then_this_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert resolve_uri(TrackingConfig()) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere:5000")
    assert resolve_uri(TrackingConfig()) == "http://elsewhere:5000"
    assert (
        resolve_uri(TrackingConfig(uri="sqlite:///sub/runs.db?timeout=9"))
        == f"sqlite:///{tmp_path}/sub/runs.db?timeout=9"
    )
    assert resolve_uri(TrackingConfig(uri="sqlite:////data/runs.db")) == "sqlite:////data/runs.db"
    assert resolve_uri(TrackingConfig(uri="databricks")) == "databricks"


@pytest.mark.parametrize("uri", ["./mlruns", "file:///data/mlruns"])
def test_folder_store_is_refused_with_what_to_use_instead(uri: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"tracking.uri={uri}: .*plain folders.*; name a database, sqlite:///mlflow.db"
    ):
        resolve_uri(TrackingConfig(uri=uri))


@pytest.mark.parametrize("uri", ["sqlite://", "sqlite:///:memory:"])
def test_database_in_memory_is_refused(uri: str) -> None:
    with pytest.raises(
        ConfigError, match=f"tracking.uri={uri}: a database in memory ends with its process; name a file"
    ):
        resolve_uri(TrackingConfig(uri=uri))


def test_database_in_a_folder_that_no_uri_can_hold_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "100%").mkdir()
    monkeypatch.chdir(tmp_path / "100%")
    with pytest.raises(
        ConfigError, match=r"tracking.uri=sqlite:///m.db: the path .*/100%/m.db must not hold % or \?; put"
    ):
        resolve_uri(TrackingConfig(uri="sqlite:///m.db"))


def test_how_to_open_names_the_command_or_the_page() -> None:
    page = "http://127.0.0.1:5000/#/runs/abc"
    assert (
        how_to_open("sqlite:////d/m.db", "abc")
        == f"run `mlflow ui --backend-store-uri sqlite:////d/m.db` and open {page}"
    )
    assert "--backend-store-uri 'sqlite:////my runs/m.db'`" in how_to_open("sqlite:////my runs/m.db")
    assert how_to_open("https://me:secret@host/", "abc") == "open https://***@host/#/runs/abc"
    assert how_to_open("http://host:5000") == "open http://host:5000"


class AwayError(Exception):
    pass


@given(
    num_points=st.integers(0, 40),
    batch=st.integers(1, 7),
    failures=st.sets(st.integers(0, 30)),
    calls=st.sets(st.integers(0, 39)),
)
@settings(max_examples=40, deadline=None)
def test_mailbox_delivers_everything_once_and_in_order_however_often_the_service_is_away(
    num_points: int, batch: int, failures: set[int], calls: set[int]
) -> None:
    arrived: list[int] = []
    attempts = iter(range(10**6))

    def receive(points: Sequence[Point]) -> None:
        assert len(points) <= batch
        if next(attempts) in failures:
            raise AwayError
        arrived.extend(point.step for point in points)

    mailbox = Mailbox(
        receive, lambda error: isinstance(error, AwayError), str, name="it", batch=batch, pause_s=0, gather_s=0
    )
    for step in range(num_points):
        mailbox.put(
            Call("a call", lambda step=step: arrived.append(step)) if step in calls else Point("x", 0.0, 0, step)
        )
    assert mailbox.close(20.0) == []
    assert arrived == list(range(num_points))


def test_refused_point_costs_no_other_and_is_named(caplog: pytest.LogCaptureFixture) -> None:
    arrived: list[int] = []
    first = threading.Event()

    def receive(points: Sequence[Point]) -> None:
        first.wait(10)  # until all points wait behind the first one, so that the next batch holds them together
        if any(point.key == "bad" for point in points):
            raise ValueError("no such name")
        arrived.extend(point.step for point in points)

    mailbox = Mailbox(receive, lambda error: isinstance(error, AwayError), str, name="the service")
    mailbox.put(*(Point("bad" if step == 3 else "good", 0.0, 0, step) for step in range(6)))
    first.set()
    assert mailbox.close(20.0) == []
    assert arrived == [0, 1, 2, 4, 5]
    assert "the service refuses bad at step 3 (no such name); it is left out there" in caplog.text


def test_points_that_go_one_by_one_do_not_wait_for_more() -> None:
    arrived: list[int] = []

    def receive(points: Sequence[Point]) -> None:
        if any(point.key == "bad" for point in points):
            raise ValueError
        arrived.extend(point.step for point in points)

    mailbox = Mailbox(receive, lambda _: False, str, name="it", gather_s=60)
    mailbox.put(*(Point("bad" if step == 0 else "good", 0.0, 0, step) for step in range(6)))
    until_s = time.monotonic() + 10
    while len(arrived) < 5 and time.monotonic() < until_s:
        time.sleep(0.01)
    assert arrived == [1, 2, 3, 4, 5]
    assert mailbox.close(10.0) == []


def test_first_point_goes_at_once_and_the_next_ones_together() -> None:
    arrived: list[list[int]] = []
    mailbox = Mailbox(lambda points: arrived.append([point.step for point in points]), lambda _: False, str, name="it")
    for step in range(6):
        mailbox.put(Point("x", 0.0, 0, step))
        time.sleep(0.05)
    assert arrived[:1] == [[0]]
    assert mailbox.close(20.0) == []
    assert arrived == [[0], [1, 2, 3, 4, 5]]


def test_full_batch_does_not_wait() -> None:
    arrived: list[int] = []
    mailbox = Mailbox(lambda points: arrived.append(len(points)), lambda _: False, str, name="it", batch=2, gather_s=60)
    began_s = time.monotonic()
    for step in range(9):
        mailbox.put(Point("x", 0.0, 0, step))
    assert mailbox.close(20.0) == []
    assert time.monotonic() - began_s < 10
    assert sum(arrived) == 9


@pytest.mark.parametrize("failures", [1, 3])
def test_an_absence_is_told_once_and_a_single_attempt_that_fails_is_none(
    failures: int, caplog: pytest.LogCaptureFixture
) -> None:
    left = iter(range(failures))

    def receive(points: Sequence[Point]) -> None:
        if next(left, None) is not None:
            raise AwayError("connection aborted")

    with caplog.at_level("INFO", logger="meamtm"):
        mailbox = Mailbox(receive, lambda error: isinstance(error, AwayError), str, name="it", pause_s=0.01, gather_s=0)
        for step in range(3):
            mailbox.put(Point("x", 0.0, 0, step))
        assert mailbox.close(20.0) == []
    told = [record.levelname for record in caplog.records]
    assert told == ([] if failures == 1 else ["WARNING", "INFO"])
    if failures > 1:
        assert "it does not answer (connection aborted); the run goes on" in caplog.text
        assert "it answers again after 0 s" in caplog.text


def test_closing_a_mailbox_waits_no_longer_than_it_was_told() -> None:
    def receive(points: Sequence[Point]) -> None:
        raise AwayError

    mailbox = Mailbox(receive, lambda error: isinstance(error, AwayError), str, name="it")
    mailbox.put(Point("x", 0.0, 0, 1), Point("x", 0.0, 0, 2))
    began_s = time.monotonic()
    assert len(mailbox.close(0.3)) == 2
    assert time.monotonic() - began_s < 2


def test_a_run_names_the_commit_and_whether_files_differ_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert commit_of(tmp_path) == "unknown"
    (tmp_path / "code.py").write_text("1")
    for words in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x"]):
        subprocess.run(["git", "-C", tmp_path, *words], check=True)
    clean = commit_of(tmp_path)
    assert re.fullmatch(r"[0-9a-f]{40}", clean)
    (tmp_path / "code.py").write_text("2")
    assert commit_of(tmp_path) == f"{clean}-dirty"
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "hook"))  # of whoever calls git
    assert commit_of(tmp_path) == f"{clean}-dirty"
    monkeypatch.setattr("meamtm.tracking.commit.__file__", str(tmp_path / "code.py"))
    assert commit_of_this_code() == f"{clean}-dirty"
    monkeypatch.setattr("meamtm.tracking.commit.__file__", str(tmp_path / "installed.py"))
    assert commit_of_this_code() == "unknown", "an environment may lie in somebody's checkout"
    monkeypatch.setenv(JOB_COMMIT, clean)
    assert commit_of_this_code() == clean
