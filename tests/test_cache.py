import logging
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from meamtm.config import DataConfig
from meamtm.data.audio import read_audio, resampled_length
from meamtm.data.cache import open_clips
from meamtm.data.clips import Clips
from meamtm.data.pack import pack, read_card
from meamtm.data.packed import Packed
from meamtm.errors import DataError


def settings(packed: Path, cache_dir: Path, **others: str) -> DataConfig:
    return DataConfig(path=str(packed), cache_dir=str(cache_dir), **others)


def waveforms_file(cache_dir: Path) -> Path:
    return next(cache_dir.glob("*/waveforms.arrow"))


def test_it_gives_the_sounds_that_were_packed(clips: Clips, packed: Path) -> None:
    sounds = [sound for group in range(2) for sound in Packed(str(packed)).sounds(group)]
    assert len(clips) == len(sounds) == 100
    for number, sound in enumerate(sounds):
        np.testing.assert_array_equal(clips.waveform(number), read_audio(sound)[0])


def test_facts_are_those_of_the_data_set(clips: Clips, packed: Path) -> None:
    card, table = read_card(packed), Packed(str(packed)).table()
    assert (clips.classes, clips.multi_label, clips.digest) == (card.classes, False, card.digest)
    assert clips.ids == table.column("clip_id").to_pylist()
    assert clips.splits == [None] * 100
    np.testing.assert_array_equal(clips.folds, table.column("fold"))
    np.testing.assert_array_equal(clips.targets, np.eye(10, dtype=np.float32)[table.column("label")])
    names = table.column("group").to_pylist()
    assert (
        len(set(zip(clips.groups.tolist(), names, strict=True))) == len(set(names)) == len(set(clips.groups.tolist()))
    )


def test_clips_are_resampled_once_to_the_rate_asked_for(packed: Path, tmp_path: Path) -> None:
    clips = open_clips(settings(packed, tmp_path), 6_000)
    np.testing.assert_array_equal(clips.num_samples, [resampled_length(4_000, 8_000, 6_000)] * 100)
    np.testing.assert_array_equal(clips.waveform(9), read_audio(Packed(str(packed)).sounds(0)[9], 6_000)[0])
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == [f"{clips.digest}-6000"]


def test_several_labels_become_several_ones(tmp_path: Path, sounds: Path) -> None:
    names = sorted(path.name for path in (sounds / "audio").iterdir())[:3]
    table = tmp_path / "list.csv"
    table.write_text(f"path,label\n{names[0]},b;a\n{names[1]},c\n{names[2]},b\n")
    pack(sounds / "audio", tmp_path / "out", table)
    for cache in ("arrow", "none"):
        clips = open_clips(settings(tmp_path / "out", tmp_path / "cache", cache=cache), 8_000)
        np.testing.assert_array_equal(clips.targets, [[1, 1, 0], [0, 0, 1], [0, 1, 0]])
        assert clips.multi_label


def test_the_files_are_plain_arrow(clips: Clips, cache_dir: Path) -> None:
    with pa.memory_map(str(cache_dir / f"{clips.digest}-8000" / "waveforms.arrow")) as file:
        table = pa.ipc.open_file(file).read_all()
    assert str(table.schema.field("waveform").type) == "list<item: int16 not null>"
    np.testing.assert_array_equal(table.column("waveform")[42].as_py(), clips.waveform(42))


def test_views_are_read_only_and_cost_no_memory(clips: Clips) -> None:
    waveform = clips.waveform(3)
    assert not waveform.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        waveform[0] = 1
    for column in (clips.targets, clips.folds, clips.num_samples):
        assert not column.flags.owndata


def test_a_second_opening_reads_what_is_there(packed: Path, tmp_path: Path) -> None:
    open_clips(settings(packed, tmp_path), 8_000)
    before = waveforms_file(tmp_path).stat()
    open_clips(settings(packed, tmp_path), 8_000)
    after = waveforms_file(tmp_path).stat()
    assert (before.st_mtime_ns, before.st_ino) == (after.st_mtime_ns, after.st_ino)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def write_nonsense(path: Path) -> None:
    path.with_name("clips.arrow").write_bytes(b"nonsense")


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, write_nonsense, empty, Path.unlink])
def test_a_damaged_cache_is_built_again_with_a_warning(
    damage, packed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = open_clips(settings(packed, tmp_path), 8_000).waveform(5).copy()
    damage(waveforms_file(tmp_path))
    again = open_clips(settings(packed, tmp_path), 8_000)
    np.testing.assert_array_equal(again.waveform(5), good)
    assert "is damaged or of another version and is built again" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [f"{again.digest}-8000"]


def test_processes_that_start_together_build_one_cache(packed: Path, tmp_path: Path) -> None:
    code = (
        "import sys, logging; logging.basicConfig(level=logging.INFO);"
        "from meamtm.config import DataConfig; from meamtm.data.cache import open_clips;"
        "clips = open_clips(DataConfig(path=sys.argv[1], cache_dir=sys.argv[2]), 8000);"
        "print(int(clips.waveform(99).astype(int).sum()))"
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, packed, tmp_path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    results = [process.communicate(timeout=120) for process in started]
    assert len({out for out, _ in results}) == 1
    assert results[0][0].strip().lstrip("-").isdigit(), results[0][1]
    assert sum("decoding 100 clips" in log for _, log in results) == 1


def test_a_waiting_process_says_so(packed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    code = (
        "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire();"
        "print('held', flush=True); sys.stdin.read()"
    )
    lock = tmp_path / f".{read_card(packed).digest}-8000.lock"
    with subprocess.Popen(
        [sys.executable, "-c", code, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as builder:
        assert builder.stdout is not None
        assert builder.stdout.readline() == "held\n"
        said = threading.Event()

        def hear(record: logging.LogRecord) -> bool:
            if "waiting" in record.msg:
                said.set()
            return True

        caplog.handler.addFilter(hear)
        release = threading.Thread(target=lambda: (said.wait(60), builder.stdin and builder.stdin.close()))
        release.start()
        assert len(open_clips(settings(packed, tmp_path), 8_000)) == 100
        release.join()
    assert "waiting for another process that decodes sounds into" in caplog.text


def test_without_a_cache_the_same_sounds_are_decoded_on_demand(clips: Clips, packed: Path, tmp_path: Path) -> None:
    streamed = open_clips(settings(packed, tmp_path, cache="none"), 8_000)
    assert not any(tmp_path.iterdir())
    np.testing.assert_array_equal(streamed.targets, clips.targets)
    np.testing.assert_array_equal(streamed.num_samples, clips.num_samples)
    chosen, starts = np.array([99, 0, 63, 64]), np.array([0, 10, 3_900, 3_999])
    rows, expected = np.full((2, 4, 500), 7, np.int16)
    streamed.waveforms.fill(chosen, starts, rows)
    clips.waveforms.fill(chosen, starts, expected)
    np.testing.assert_array_equal(rows, expected)
    assert not rows[2, 100:].any()
    for number in (0, 64, 99):
        np.testing.assert_array_equal(streamed.waveform(number), clips.waveform(number))


def test_a_missing_data_set_names_the_key_and_the_command(tmp_path: Path) -> None:
    message = (
        rf"data\.path={tmp_path}/none: no packed data set there; make one with `meamtm pack SOURCE {tmp_path}/none`"
    )
    with pytest.raises(DataError, match=message):
        open_clips(settings(tmp_path / "none", tmp_path), 8_000)


def test_a_damaged_shard_is_named_and_leaves_no_cache(packed: Path, tmp_path: Path) -> None:
    shutil.copytree(packed, tmp_path / "set")
    (tmp_path / "set" / "clips-00000.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match=r"clips-00000\.parquet is missing or damaged .*; pack the data set again"):
        open_clips(settings(tmp_path / "set", tmp_path / "cache"), 8_000)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


@pytest.mark.parametrize("cache", ["arrow", "none"])
def test_a_damaged_clip_is_named(cache: str, packed: Path, tmp_path: Path) -> None:
    shutil.copytree(packed, tmp_path / "set")
    [shard] = (tmp_path / "set").glob("clips-*.parquet")
    table = pq.read_table(shard)
    audio = [{**sound, "bytes": b"fLaC not really"} for sound in table.column("audio").to_pylist()]
    column = pa.array(audio, table.schema.field("audio").type)
    pq.write_table(table.set_column(table.schema.get_field_index("audio"), "audio", column), shard)
    first = table.column("clip_id")[0].as_py()
    with pytest.raises(DataError, match=rf"data\.path=.*/set: clip {first} is damaged \(.*\); pack the data set again"):
        open_clips(settings(tmp_path / "set", tmp_path / "cache", cache=cache), 8_000).waveform(0)


def test_a_cache_that_does_not_fit_is_refused(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(
        DataError, match=r"data\.cache_dir=.* do not fit into the 0\.0 GB left there; .*data\.cache=none"
    ):
        open_clips(settings(packed, tmp_path), 8_000)


def test_a_cache_dir_that_cannot_be_made_is_refused(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data\.cache_dir=.*/file/cache: cannot be used .*; name a writable folder"):
        open_clips(settings(packed, tmp_path / "file" / "cache"), 8_000)


def test_an_open_file_descriptor_is_not_left_per_opening(packed: Path, cache_dir: Path) -> None:
    descriptors = Path("/proc/self/fd")
    if not descriptors.is_dir():
        pytest.skip("needs /proc")
    before = len(list(descriptors.iterdir()))
    for _ in range(20):
        open_clips(settings(packed, cache_dir), 8_000)
    assert len(list(descriptors.iterdir())) <= before + 2
