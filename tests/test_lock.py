"""One process at a time trains a run: the second is told who does, and a dead one holds nothing."""

import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import tiny

from meamtm.config import flatten, run_folder, write_yaml
from meamtm.errors import BusyError, ConfigError
from meamtm.training.lock import held


@pytest.mark.slow
def test_a_second_process_is_told_who_trains_the_run_and_takes_over_from_a_dead_one(
    packed: Path, cache_dir: Path, tmp_path: Path
) -> None:
    config = tiny(packed, cache_dir, tmp_path / "runs", {"train.epochs": 2_000})
    write_yaml(tmp_path / "run.yaml", flatten(config))
    command = [sys.executable, "-m", "meamtm.cli", "train", str(tmp_path / "run.yaml")]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as first:
        deadline_s = time.monotonic() + 60
        while not list(run_folder(config).glob("epoch-*")):
            assert first.poll() is None
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
        second = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
        assert second.returncode == 2
        assert re.fullmatch(
            rf"meamtm: .*: process {first.pid} on {re.escape(socket.gethostname())}, since 20\d\d-\d\d-\d\d "
            r"\d\d:\d\d:\d\d[+-]\d\d:\d\d, is at work on it; wait for that process or stop it, or set another name\n",
            second.stderr,
        ), second.stderr
        first.kill()
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as third:
        assert third.stderr is not None
        assert any("epoch" in line for line in third.stderr), "it goes on without a word about the dead one"
        third.send_signal(signal.SIGTERM)
        assert "the same command continues" in third.stderr.read()
    assert third.returncode == 1


def test_a_folder_in_which_nothing_began_goes_again(tmp_path: Path) -> None:
    with held(tmp_path / "runs" / "one"):
        assert (tmp_path / "runs" / "one").is_dir()
    assert not any(tmp_path.iterdir())


def test_what_was_there_stays(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    with held(tmp_path / "run"):
        (tmp_path / "run" / "epoch").touch()
    with held(tmp_path / "run"):
        pass
    assert (tmp_path / "run" / "epoch").exists()
    assert (tmp_path / "mine").exists()


def test_a_waiting_process_gets_the_folder_when_it_is_free(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from meamtm.training.lock import held\n"
        "with held(Path(sys.argv[1])): print('mine', flush=True); time.sleep(2)"
    )
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "mine\n"
        with pytest.raises(BusyError, match=f"process {other.pid} on "), held(tmp_path):
            pass
        with held(tmp_path, wait_s=30):
            assert other.wait(5) == 0


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = r"file/run: cannot be written \(Not a directory\); name a folder that can"
    with pytest.raises(ConfigError, match=message), held(tmp_path / "file" / "run"):
        pytest.fail("nobody may come here")
