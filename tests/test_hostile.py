"""Bad input is packed right or quarantined with its reason: no crash, no hang, no memory beyond a bound."""

import csv
import json
import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import hostile
import numpy as np
import pytest
import soundfile
from command import meamtm_command
from hypothesis import given
from hypothesis import strategies as st

from meamtm.data.audio import read_audio, to_flac
from meamtm.data.packed import Packed
from meamtm.errors import DataError

HOUR_S = 3_600
MOST_MB = 300
"""What an hour-long file may take, beside Python and its libraries."""


class Made(NamedTuple):
    """What packing made of the corpus."""

    packed: set[str]
    rejected: dict[str, str]
    err: str


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The corpus and two good files, packed by the command in a process of its own, within a minute."""
    folder = tmp_path_factory.mktemp("corpus")
    owl, cat = folder / "in" / "owl", folder / "in" / "cat"
    owl.mkdir(parents=True)
    cat.mkdir()
    for name, (content, _) in hostile.contents().items():
        (owl / name).write_bytes(content)
    for name, make in hostile.things(folder).items():
        make(owl / name)
    for good in (owl, cat):
        (good / "good.wav").write_bytes(hostile.encoded(hostile.tone()))
    command = [sys.executable, "-m", "meamtm.cli", "pack", str(folder / "in"), str(folder / "out")]
    done = subprocess.run(command, check=False, capture_output=True, timeout=60)
    err = done.stderr.decode()
    assert done.returncode == 0, err
    with (folder / "out" / "rejected.csv").open(newline="", encoding="utf-8") as file:
        rejected = {Path(row["path"]).name: row["reason"] for row in csv.DictReader(file)}
    clip_ids = Packed(str(folder / "out")).table().column("clip_id").to_pylist()
    packed = {clip_id.rpartition("/")[2] for clip_id in clip_ids}
    return Made(packed, rejected, err)


@pytest.mark.parametrize("name", hostile.contents(), ids=lambda name: ascii(name)[:40])
def test_a_hostile_file_is_packed_or_quarantined_with_its_reason(made: Made, name: str) -> None:
    reason = hostile.contents()[name][1]
    is_packed = name.removesuffix(Path(name).suffix) in made.packed
    found = made.rejected.get(name.encode(errors="backslashreplace").decode())
    assert is_packed == (found is None), "it is one of the two"
    if is_packed:
        assert reason is None or "PACKED" in reason
    else:
        assert reason is not None, found
        assert re.search(reason, found), found
        assert "\n" not in found


@pytest.mark.parametrize("name", hostile.things(Path()))
def test_what_is_no_file_is_quarantined(made: Made, name: str) -> None:
    assert made.rejected[name] in ("no such file", "not a file")


def test_packing_hostile_files_leaves_no_trace_of_python(made: Made) -> None:
    """What libmpg123 says of a damaged MP3 it says past everybody."""
    assert "Traceback" not in made.err
    assert "Warning:" not in re.sub(r"(?m)^(Warning: Xing|.*libmpg123).*$", "", made.err)


def test_at_least_sixty_kinds_are_tried() -> None:
    assert len(hostile.contents()) + len(hostile.things(Path())) >= 60


def test_a_hundred_good_files_survive_a_thousand_broken_ones(tmp_path: Path) -> None:
    for number in range(1_100):
        folder = tmp_path / "in" / ("owl" if number % 2 else "cat")
        folder.mkdir(parents=True, exist_ok=True)
        good = hostile.encoded(hostile.tone(500 + number))
        (folder / f"{number}.wav").write_bytes(good if number % 11 == 0 else good[: 30 + number % 60])
    assert meamtm_command("pack", tmp_path / "in", tmp_path / "out").code == 0
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert (card["num_clips"], card["num_rejected"]) == (100, 1_000)


def peak_mb(code: str, *words: object) -> float:
    """Runs code in a process of its own, and gives what it took at most above what importing takes."""
    before = "import sys, resource; from pathlib import Path; from meamtm.data.pack import pack; "
    after = "; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
    peaks = []
    for work in ("pass", code):
        command = [sys.executable, "-c", before + work + after, *map(str, words)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=240)
        peaks.append(float(done.stdout))
    return peaks[1] - peaks[0]


@pytest.mark.slow
def test_an_hour_long_file_is_packed_in_bounded_memory(tmp_path: Path) -> None:
    """In stereo at 44.1 kHz, as a recorder writes it: 635 MB."""
    for name in ("owl", "cat"):
        (tmp_path / "in" / name).mkdir(parents=True)
    (tmp_path / "in" / "owl" / "short.wav").write_bytes(hostile.encoded(hostile.tone()))
    rng, second = np.random.default_rng(0), 44_100
    with soundfile.SoundFile(tmp_path / "in" / "cat" / "hour.wav", "w", second, 2, "PCM_16") as file:
        for _ in range(HOUR_S // 60):
            file.write((0.02 * rng.standard_normal((60 * second, 2), np.float32)).clip(-1, 1))
    used_mb = peak_mb("pack(Path(sys.argv[1]), Path(sys.argv[2]))", tmp_path / "in", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "card.json").read_text())["total_s"] > HOUR_S
    assert used_mb < MOST_MB


@pytest.mark.slow
@pytest.mark.parametrize("num_rows", [200_000, pytest.param(1_000_000, marks=pytest.mark.soak)])
def test_a_long_table_is_packed_in_bounded_memory(tmp_path: Path, num_rows: int) -> None:
    """Of a hundred files that are there, and others that are not."""
    (tmp_path / "in").mkdir()
    rows = [f"{number:07d}.wav,{'owl' if number % 2 else 'cat'}\n" for number in range(num_rows)]
    (tmp_path / "in" / "list.csv").write_text("path,label\n" + "".join(rows))
    for place in range(100):
        number = place * (num_rows // 100) + place
        (tmp_path / "in" / f"{number:07d}.wav").write_bytes(hostile.encoded(hostile.tone()))
    words = (tmp_path / "in", tmp_path / "out", tmp_path / "in" / "list.csv")
    used_mb = peak_mb("pack(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))", *words)
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert (card["num_clips"], card["num_rejected"]) == (100, num_rows - 100)
    assert used_mb * 1e6 / num_rows < 2_000, "2 KB a row"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_quarantined(tmp_path: Path) -> None:
    for name in ("owl", "cat"):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "a.wav").write_bytes(hostile.encoded(hostile.tone()))
    closed = tmp_path / "in" / "owl" / "closed.wav"
    closed.write_bytes(hostile.encoded(hostile.tone()))
    closed.chmod(0)
    assert meamtm_command("pack", tmp_path / "in", tmp_path / "out").code == 0
    assert "closed.wav,cannot be" in (tmp_path / "out" / "rejected.csv").read_text()


@pytest.fixture(scope="module")
def whole() -> dict[str, bytes]:
    """A sound in every format."""
    return {kind: hostile.encoded(hostile.tone(4_000), kind=kind.upper()) for kind in ("wav", "flac", "ogg", "mp3")}


changed_bytes = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=20)


@given(kind=st.sampled_from(["wav", "flac", "ogg", "mp3"]), changes=changed_bytes, end=st.floats(0, 1))
def test_a_damaged_sound_is_read_or_refused(
    whole: dict[str, bytes], kind: str, changes: list[tuple[float, int]], end: float
) -> None:
    sound = bytearray(whole[kind])
    for place, value in changes:
        sound[int(place * (len(sound) - 1))] = value
    damaged = bytes(sound[: int(end * len(sound))])
    with suppress(DataError):
        flac = to_flac(damaged)
        waveform, rate_hz = read_audio(damaged)
        assert (len(waveform), rate_hz) == (flac.num_samples, flac.sample_rate_hz)
