"""A disk that fills up: one clear error, what was there before is intact, and the same command goes on."""

import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny

from meamtm.config import flatten, run_folder, write_yaml
from meamtm.data.pack import pack
from meamtm.data.packed import read_card
from meamtm.training.checkpoint import newest, read_record
from meamtm.training.context import Stopped
from meamtm.training.run import run_here

pytestmark = pytest.mark.slow


def limited(largest_bytes: int, *words: object) -> subprocess.CompletedProcess[str]:
    """Runs `meamtm` in a process whose files cannot grow beyond a size, as on a disk with no more room."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_bytes, largest_bytes))

    command = [sys.executable, "-m", "meamtm.cli", *map(str, words)]
    return subprocess.run(command, check=False, capture_output=True, text=True, preexec_fn=limit, timeout=120)


def test_packing_onto_a_full_disk_says_so_and_keeps_the_older_set(sounds: Path, tmp_path: Path) -> None:
    pack(sounds, tmp_path / "out")
    before = read_card(tmp_path / "out")
    manifest = tmp_path / "half.csv"
    names = sorted(path.name for path in (sounds / "audio").iterdir())[::2]
    manifest.write_text("path,label\n" + "".join(f"audio/{name},{name.split('-')[3]}\n" for name in names))
    full = limited(100_000, "pack", sounds, tmp_path / "out", "--manifest", manifest)
    assert full.returncode == 2, full.stderr
    assert re.search(
        r"\nmeamtm: OUT=.*/out: cannot be written \(.*File too large.*\); make room there, or name another folder\n$",
        full.stderr,
    ), full.stderr
    assert read_card(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half.csv", "out"], "nothing is left behind"
    pack(sounds, tmp_path / "out", manifest)
    assert read_card(tmp_path / "out").num_clips == len(names)


def test_a_checkpoint_onto_a_full_disk_says_so_and_the_run_goes_on_from_the_one_before(
    packed: Path, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scratch").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    config = tiny(packed, cache_dir, tmp_path / "runs", {"train.epochs": 2_000})
    write_yaml(tmp_path / "run.yaml", flatten(config))
    folder = run_folder(config)
    with pytest.raises(Stopped):
        run_here(config, should_stop=lambda: newest(folder) is not None)
    before = newest(folder)
    assert before is not None
    epoch = read_record(before)["epoch"]
    full = limited(8_000, "train", tmp_path / "run.yaml")
    assert full.returncode == 2, full.stderr
    assert re.search(
        rf"\nmeamtm: .*/epoch-0*{epoch + 1}: cannot be written \(.*\); make room there, or set TMPDIR to another "
        r"folder; the same command continues\n$",
        full.stderr,
    ), full.stderr
    assert "Traceback" not in full.stderr
    assert newest(folder) == before
    assert not list((tmp_path / "scratch").glob("meamtm*"))
    command = [sys.executable, "-m", "meamtm.cli", "train", str(tmp_path / "run.yaml")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as last:
        assert last.stderr is not None
        assert any(line.startswith(f"epoch {epoch + 1} ") for line in last.stderr)
        last.send_signal(signal.SIGTERM)
        last.stderr.read()
    assert newest(folder) != before
