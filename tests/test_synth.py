import csv
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import soundfile

from meamtm.data.synth import NUM_FOLDS, SOUNDS, write_synth
from meamtm.errors import DataError


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "synth.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_it_looks_like_esc_50(sounds: Path) -> None:
    rows = table(sounds)
    assert list(rows[0]) == ["filename", "fold", "target", "category", "src_file", "take"]
    for row in rows:
        assert row["filename"] == f"{row['fold']}-{row['src_file']}-{row['take']}-{row['target']}.wav"
        assert list(SOUNDS)[int(row["target"])] == row["category"]
    assert {row["filename"] for row in rows} == {path.name for path in (sounds / "audio").iterdir()}


def test_every_class_has_as_many_clips_in_every_fold(sounds: Path) -> None:
    counts = Counter((row["category"], row["fold"]) for row in table(sounds))
    assert len(counts) == len(SOUNDS) * NUM_FOLDS
    assert set(counts.values()) == {2}


def test_takes_of_one_source_share_class_and_fold(sounds: Path) -> None:
    places, takes = defaultdict(set), defaultdict(list)
    for row in table(sounds):
        places[row["src_file"]].add((row["category"], row["fold"]))
        takes[row["src_file"]].append(row["take"])
    assert {len(found) for found in places.values()} == {1}
    assert all(sorted(set(names)) == names for names in takes.values())
    assert any(len(names) == 2 for names in takes.values())


def test_the_same_seed_writes_the_same_bytes_and_another_seed_does_not(sounds: Path, tmp_path: Path) -> None:
    settings = {"clips_per_class": 10, "clip_s": 0.5, "sample_rate_hz": 8_000}
    write_synth(tmp_path / "again", **settings)
    assert files(tmp_path / "again") == files(sounds)
    write_synth(tmp_path / "other", **settings, seed=1)
    one, other = files(sounds), files(tmp_path / "other")
    assert all(one[name] != other[name] for name in one if name.endswith(".wav"))


def test_a_second_run_rewrites_nothing(sounds: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in sounds.rglob("*")}
    write_synth(sounds, clips_per_class=10, clip_s=0.5, sample_rate_hz=8_000)
    assert {path: path.stat().st_mtime_ns for path in sounds.rglob("*")} == before


def test_loudness_does_not_tell_the_class(sounds: Path) -> None:
    levels_db = defaultdict(list)
    for row in table(sounds):
        samples, _ = soundfile.read(sounds / "audio" / row["filename"])
        assert np.abs(samples).max() > 0
        levels_db[row["category"]].append(10 * np.log10(np.mean(samples**2)))
    means = [np.mean(levels) for levels in levels_db.values()]
    spread = np.mean([np.std(levels) for levels in levels_db.values()])
    assert np.std(means) < 0.6 * spread


def test_progress_counts_to_the_end(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    write_synth(
        tmp_path / "set",
        clips_per_class=5,
        clip_s=0.1,
        sample_rate_hz=4_000,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(done, 50) for done in range(1, 51)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clips_per_class": 4}, "clips_per_class=4: every class needs a clip in each of 5 folds"),
        ({"clip_s": 0.01}, "clip_s=0.01: a clip lasts 0.1 to 60 s"),
        ({"sample_rate_hz": 100}, "sample_rate_hz=100: the sounds need 4000 to 192000 Hz"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, int | float], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        write_synth(tmp_path / "set", **settings)
    assert not any(tmp_path.iterdir())


def test_a_folder_that_holds_something_else_is_left_alone(sounds: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="exists and is not this sound set; name another folder"):
        write_synth(tmp_path)
    with pytest.raises(DataError, match="exists and is not this sound set"):
        write_synth(sounds, clips_per_class=10, clip_s=0.5, sample_rate_hz=8_000, seed=5)
    assert files(tmp_path) == {"notes.txt": b"mine"}


def test_an_interrupted_run_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_synth(tmp_path / "set", clips_per_class=5, clip_s=0.1, progress=interrupt)
    assert not any(tmp_path.iterdir())


def test_a_damaged_set_is_not_taken_for_a_whole_one(tmp_path: Path) -> None:
    write_synth(tmp_path / "set", clips_per_class=5, clip_s=0.1)
    next((tmp_path / "set" / "audio").iterdir()).unlink()
    with pytest.raises(DataError, match=r"incomplete \(1 clips are missing\)"):
        write_synth(tmp_path / "set", clips_per_class=5, clip_s=0.1)
