import csv
import hashlib
import io
import json
import os
import re
import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from meamtm.data import shards
from meamtm.data.audio import read_audio
from meamtm.data.folds import assign_folds
from meamtm.data.pack import pack, read_card
from meamtm.data.packed import Packed
from meamtm.data.sources import Entry
from meamtm.data.synth import SOUNDS
from meamtm.errors import DataError
from meamtm.files import whole_folder


def write_sound(path: Path, seed: int = 0, rate_hz: int = 8_000, num_samples: int = 400) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.random.default_rng(seed).uniform(-0.5, 0.5, num_samples), rate_hz)
    return path


def class_folders(folder: Path, **num_clips: int) -> Path:
    for name, count in num_clips.items():
        for number in range(count):
            write_sound(folder / name / f"{number:02d}.wav", seed=number)
    return folder


def manifest(folder: Path, text: str) -> Path:
    """A manifest whose sounds, a.wav to f.wav, are there."""
    for seed, name in enumerate("abcdef"):
        write_sound(folder / f"{name}.wav", seed)
    path = folder / "list.csv"
    path.write_text(text)
    return path


def rejected(out: Path) -> dict[str, str]:
    with (out / "rejected.csv").open(newline="") as file:
        return {Path(row["path"]).name: row["reason"] for row in csv.DictReader(file)}


def column(out: Path, name: str) -> list:
    return Packed(str(out)).table().column(name).to_pylist()


# What is read


def test_an_esc_folder_is_found_by_itself(sounds: Path, packed: Path) -> None:
    card = read_card(packed)
    assert card.classes == tuple(SOUNDS)
    assert (card.num_clips, card.num_rejected, card.folds, card.rates_hz) == (100, 0, (1, 2, 3, 4, 5), (8_000,))
    assert card.total_s == pytest.approx(50)
    assert not card.multi_label
    assert column(packed, "group")[:3] == ["100001", "100001", "100002"]
    assert column(packed, "clip_id")[0] == "1-100001-A-0"


def test_the_esc_table_may_lie_in_meta_and_targets_need_not_be_contiguous(tmp_path: Path) -> None:
    for name in ("1-7-A-40.wav", "2-8-A-3.wav"):
        write_sound(tmp_path / "in" / "audio" / name)
    (tmp_path / "in" / "meta").mkdir()
    (tmp_path / "in" / "meta" / "esc50.csv").write_text(
        "filename,fold,target,category\n1-7-A-40.wav,1,40,helicopter\n2-8-A-3.wav,2,3,cow\n"
    )
    card = pack(tmp_path / "in", tmp_path / "out")
    assert card.classes == ("cow", "helicopter")
    assert column(tmp_path / "out", "label") == [1, 0]
    assert column(tmp_path / "out", "group") == ["7", "8"]


def test_folders_of_any_format_rate_and_channel_count_are_packed_at_their_own_rate(tmp_path: Path) -> None:
    stereo = np.random.default_rng(0).uniform(-0.5, 0.5, (4_410, 2))
    for name in ("dog/a.wav", "dog/deep/b.flac", "cat/c.ogg", "cat/d.mp3"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, stereo, 44_100)
    (tmp_path / "in" / "dog" / "notes.txt").write_text("not a sound")
    card = pack(tmp_path / "in", tmp_path / "out")
    assert card.classes == ("cat", "dog")
    assert card.rates_hz == (44_100,)
    assert column(tmp_path / "out", "clip_id") == ["cat/c", "cat/d", "dog/a", "dog/deep/b"]
    for row, original in enumerate(["cat/c.ogg", "cat/d.mp3", "dog/a.wav", "dog/deep/b.flac"]):
        kept, _ = read_audio(Packed(str(tmp_path / "out")).sounds(0)[row])
        np.testing.assert_array_equal(kept, read_audio(tmp_path / "in" / original)[0])


def test_a_name_is_a_recordings_only_where_it_is_esc50s(tmp_path: Path) -> None:
    """The third part of 1-7-A-40 is a take; of UrbanSound8K's 100032-3-0-0 it is a number."""
    for name in ("1-7-A-40.wav", "100032-3-0-0.wav", "100263-3-0-3.wav", "dog/001.wav", "cat/001.wav"):
        write_sound(tmp_path / "in" / "audio" / name)
    (tmp_path / "in" / "list.csv").write_text(
        "filename,fold,target,category\n1-7-A-40.wav,1,0,cat\n100032-3-0-0.wav,1,1,dog\n100263-3-0-3.wav,2,1,dog\n"
        "dog/001.wav,1,1,dog\ncat/001.wav,2,0,cat\n"
    )
    pack(tmp_path / "in", tmp_path / "out")
    assert column(tmp_path / "out", "group") == ["7", "100032-3-0-0", "100263-3-0-3", "dog/001", "cat/001"]


def test_sounds_of_other_kinds_are_listed_and_folders_without_sounds_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = class_folders(tmp_path / "in", ant=2, bee=2)
    (source / "bee" / "phone.m4a").write_bytes(b"\0\0\0\x20ftypM4A " + bytes(100))
    soundfile.write(source / "bee" / "old.aiff", np.full(100, 0.1), 8_000)
    write_sound(source / "bee" / "converted.wav")
    (source / "bee" / "converted.m4a").write_bytes(b"its original")
    write_sound(source / "loose.wav")
    (source / "papers").mkdir()
    (source / "papers" / "licence.txt").write_text("free")
    card = pack(source, tmp_path / "out")
    assert (card.classes, card.num_clips, card.num_rejected) == (("ant", "bee"), 6, 1)
    assert "phone.m4a,cannot be decoded" in (tmp_path / "out" / "rejected.csv").read_text()
    assert "papers: holds no sound, so no class is called papers" in caplog.text
    assert "1 sounds lie beside the classes' folders and are left out, such as loose.wav; move" in caplog.text


def test_a_manifest_gives_several_labels_folds_groups_and_splits(tmp_path: Path) -> None:
    table = manifest(
        tmp_path / "in",
        "path,label,fold,group,split\na.wav,rain;wind,3,g,train\nb.wav,wind,3,g,train\nc.wav,rain,4,h,test\n",
    )
    card = pack(tmp_path / "in", tmp_path / "out", table)
    assert card.multi_label
    assert card.classes == ("rain", "wind")
    assert card.folds == (3, 4)
    assert column(tmp_path / "out", "labels") == [[0, 1], [1], [0]]
    assert column(tmp_path / "out", "group") == ["g", "g", "h"]
    assert column(tmp_path / "out", "split") == ["train", "train", "test"]
    assert card.has_split


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("fold\na.wav,rain,1\nb.wav,wind,2\nsame.wav,rain,1\n", []),
        (
            "fold\na.wav,rain,1\nb.wav,wind,2\nsame.wav,rain,2\n",
            [r"another fold: same as a \(1 such clips\); .* group"],
        ),
        ("split\na.wav,rain,train\nb.wav,wind,train\nsame.wav,rain,test\n", ["another split: same as a .* remove"]),
        ("fold\na.wav,rain,1\nb.wav,wind,2\nsame.wav,wind,1\n", ["another label: same as a .* correct one label"]),
    ],
    ids=["together", "in two folds", "in two splits", "with two labels"],
)
def test_copies_that_a_test_would_hear_again_are_told(
    rows: str, said: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = manifest(tmp_path / "in", "path,label," + rows)
    decoded, rate_hz = soundfile.read(tmp_path / "in" / "a.wav", dtype="int16")
    soundfile.write(tmp_path / "in" / "same.wav", decoded, rate_hz, subtype="PCM_24")  # another file of the same sound
    assert pack(tmp_path / "in", tmp_path / "out", table).num_clips == 3
    told = [record.getMessage() for record in caplog.records if record.name == "meamtm.data.pack"]
    assert len(told) == len(said)
    for message, expected in zip(told, said, strict=True):
        assert re.search("^the same samples come again with " + expected, message)
    caplog.clear()
    pack(tmp_path / "in", tmp_path / "out", table)
    assert [record.getMessage() for record in caplog.records if record.name == "meamtm.data.pack"] == told, "and again"


def test_names_are_the_same_however_they_are_spelt(tmp_path: Path) -> None:
    """A list in a spreadsheet's hands gets blanks, and a Mac takes accents apart."""
    for number, folder in enumerate(("gru\u0308nspecht", "gr\u00fcnspecht", "owl")):
        write_sound(tmp_path / "folders" / folder / f"{number}.wav", number)
    assert pack(tmp_path / "folders", tmp_path / "one").classes == ("gr\u00fcnspecht", "owl")
    table = tmp_path / "folders" / "list.csv"
    table.write_text(
        "path, label ,group\ngr\u00fcnspecht/0.wav,gr\u00fcnspecht, north\n"
        "gr\u00fcnspecht/1.wav,gru\u0308nspecht,north\n owl/2.wav , owl,so\u0308d\n",
        encoding="utf-8",
    )
    card = pack(tmp_path / "folders", tmp_path / "two", table)
    assert (card.classes, card.num_clips, card.num_groups) == (("gr\u00fcnspecht", "owl"), 3, 2)
    assert column(tmp_path / "two", "group") == ["north", "north", "s\u00f6d"]
    assert column(tmp_path / "two", "clip_id")[0] == "gru\u0308nspecht/0", "as the file is called"


def test_links_are_followed_and_hidden_folders_are_not(tmp_path: Path) -> None:
    source = class_folders(tmp_path / "in", ant=2, bee=2)
    class_folders(tmp_path / "elsewhere", night=2)
    (source / "bee" / "more").symlink_to(tmp_path / "elsewhere")
    (source / "bee" / "round").symlink_to(source / "bee")
    write_sound(source / "bee" / ".versions" / "00~old.wav", 7)
    pack(source, tmp_path / "out")
    names = ["ant/00", "ant/01", "bee/00", "bee/01", "bee/more/night/00", "bee/more/night/01"]
    assert column(tmp_path / "out", "clip_id") == names


def test_a_list_that_nobody_named_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = class_folders(tmp_path / "in", ant=2, bee=2)
    (source / "labels.csv").write_text("path,label,group\nant/00.wav,ant,one\n")
    (source / "folder.csv").mkdir()
    (source / "lost.csv").symlink_to(source / "nowhere")
    assert pack(source, tmp_path / "out").num_clips == 4
    assert "labels.csv: lists clips and is not read, for each folder here is a class; name it by --manif" in caplog.text


def test_what_cannot_be_used_decides_nothing(tmp_path: Path) -> None:
    """Folds and the kind of set are those of the usable clips, wherever the others stood."""
    source = class_folders(tmp_path / "in", ant=10, bee=5)
    pack(source, tmp_path / "clean")
    rows = [f"{path.relative_to(source)},{path.parent.name}" for path in sorted(source.rglob("*.wav"))]
    for number in range(9):
        (source / "bee" / f"a{number}.wav").write_bytes(b"")
    table = source / "list.csv"
    table.write_text("path,label\n" + "\n".join([*rows, *(f"bee/a{n}.wav,bee;ant" for n in range(9))]) + "\n")
    card = pack(source, tmp_path / "out", table)
    assert (card.num_clips, card.num_rejected, card.multi_label) == (15, 9, False)
    for name in ("clip_id", "label", "fold"):
        assert column(tmp_path / "out", name) == column(tmp_path / "clean", name)
    assert card.digest == read_card(tmp_path / "clean").digest


def test_floats_that_were_written_as_whole_numbers_are_told(tmp_path: Path) -> None:
    source = class_folders(tmp_path / "in", ant=2, bee=2)
    sound = np.random.default_rng(0).uniform(-1, 1, 400).astype(np.float32)
    soundfile.write(source / "bee" / "scipy.wav", 20_000 * sound, 8_000, subtype="FLOAT")
    soundfile.write(source / "bee" / "loud.wav", 1.5 * sound, 8_000, subtype="FLOAT")
    assert pack(source, tmp_path / "out").num_rejected == 1
    assert re.fullmatch(
        r"holds samples as large as (19|20)\d{3}, where full scale is 1; divide .* 32768",
        rejected(tmp_path / "out")["scipy.wav"],
    )


def test_a_set_with_a_split_and_no_folds_tells_of_none(tmp_path: Path) -> None:
    table = manifest(tmp_path / "in", "path,label,split\na.wav,rain,train\nb.wav,wind,train\nc.wav,rain,test\n")
    assert pack(tmp_path / "in", tmp_path / "out", table).folds == ()


def test_esc_10_is_packed(esc10: Path, tmp_path: Path) -> None:
    card = pack(esc10, tmp_path / "out")
    assert (card.num_clips, len(card.classes), card.folds, card.rates_hz) == (400, 10, (1, 2, 3, 4, 5), (44_100,))
    assert card.classes[:2] == ("dog", "rooster")


# Folds


def test_missing_folds_are_five_stratified_and_the_same_each_time(tmp_path: Path) -> None:
    source = class_folders(tmp_path / "in", ant=10, bee=15)
    pack(source, tmp_path / "one")
    pack(source, tmp_path / "two")
    folds, labels = column(tmp_path / "one", "fold"), column(tmp_path / "one", "label")
    assert folds == column(tmp_path / "two", "fold")
    for fold in range(1, 6):
        held_out = [label for label, where in zip(labels, folds, strict=True) if where == fold]
        assert (held_out.count(0), held_out.count(1)) == (2, 3)


@given(st.lists(st.tuples(st.sampled_from("xyz"), st.integers(0, 12)), min_size=2, max_size=60))
def test_a_group_never_spans_folds(clips: list[tuple[str, int]]) -> None:
    entries = [Entry(str(n), Path("a.wav"), (label,), str(group)) for n, (label, group) in enumerate(clips)]
    places = defaultdict(set)
    for entry in assign_folds(entries):
        assert entry.fold is not None
        assert 1 <= entry.fold <= 5
        places[entry.group].add(entry.fold)
    assert {len(folds) for folds in places.values()} == {1}


# What is written


def test_parquet_follows_the_documented_schema(packed: Path) -> None:
    card = read_card(packed)
    file = pq.ParquetFile(packed / card.shards[0])
    assert file.schema_arrow.names == [
        "clip_id",
        "audio",
        "sampling_rate",
        "num_samples",
        "label",
        "fold",
        "group",
        "split",
    ]
    assert str(file.schema_arrow.field("audio").type) == "struct<bytes: binary, path: string>"
    assert [str(file.schema_arrow.field(name).type) for name in ("label", "fold", "num_samples")] == [
        "int64",
        "int16",
        "int64",
    ]
    facts = file.metadata.metadata
    assert json.loads(facts[b"meamtm.classes"]) == list(card.classes)
    assert facts[b"meamtm.digest"].decode() == card.digest
    features = json.loads(facts[b"huggingface"])["info"]["features"]
    assert features["audio"] == {"_type": "Audio"}
    assert features["label"] == {"names": list(card.classes), "_type": "ClassLabel"}
    assert list(features) == file.schema_arrow.names
    assert [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)] == [64, 36]
    sound = file.metadata.row_group(0).column(1)
    assert (sound.path_in_schema, sound.compression, sound.statistics) == ("audio.bytes", "UNCOMPRESSED", None)
    assert "DICTIONARY" not in " ".join(sound.encodings)


def test_many_shards_hold_the_same_as_one(
    sounds: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 100_000)
    monkeypatch.setattr(shards, "ROW_GROUP_CLIPS", 7)
    card = pack(sounds, tmp_path / "out")
    assert len(card.shards) > 3
    assert card.digest == read_card(packed).digest
    many, one = Packed(str(tmp_path / "out")), Packed(str(packed))
    assert many.num_row_groups == 15
    assert many.table().drop_columns("row_group").equals(one.table().drop_columns("row_group"))
    assert [sound for group in range(15) for sound in many.sounds(group)] == [*one.sounds(0), *one.sounds(1)]


def test_the_digest_is_of_content_not_of_place_or_time(sounds: Path, packed: Path, tmp_path: Path) -> None:
    shutil.copytree(sounds, tmp_path / "copy")  # new times
    assert pack(tmp_path / "copy", tmp_path / "a").digest == read_card(packed).digest
    path = next((tmp_path / "copy" / "audio").iterdir())
    samples, rate_hz = soundfile.read(path, dtype="int16")
    samples[7] += 1
    soundfile.write(path, samples, rate_hz)
    assert pack(tmp_path / "copy", tmp_path / "b").digest != read_card(packed).digest


def test_the_digest_can_be_computed_from_the_documentation(packed: Path) -> None:
    card, set_ = read_card(packed), Packed(str(packed))
    text = json.dumps([card.classes, card.multi_label])
    sounds = [sound for group in range(set_.num_row_groups) for sound in set_.sounds(group)]
    for facts, sound in zip(set_.table().drop_columns("row_group").to_pylist(), sounds, strict=True):
        samples, _ = soundfile.read(io.BytesIO(sound), dtype="int16")
        text += json.dumps([facts, hashlib.sha256(samples.astype("<i2").tobytes()).hexdigest()], sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == card.digest


def test_labels_and_folds_are_part_of_the_digest(tmp_path: Path) -> None:
    digests = set()
    for name, text in {
        "plain": "path,label,fold\na.wav,x,1\nb.wav,y,2\n",
        "label": "path,label,fold\na.wav,x,1\nb.wav,z,2\n",
        "fold": "path,label,fold\na.wav,x,1\nb.wav,y,3\n",
    }.items():
        table = manifest(tmp_path / "in", text)
        digests.add(pack(tmp_path / "in", tmp_path / name, table).digest)
    assert len(digests) == 3


# Packing again


def test_the_same_source_again_is_recognised(sounds: Path, packed: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in packed.iterdir()}
    assert pack(sounds, packed) == read_card(packed)
    assert {path: path.stat().st_mtime_ns for path in packed.iterdir()} == before


def test_a_changed_source_is_packed_again(tmp_path: Path) -> None:
    source = class_folders(tmp_path / "in", ant=3, bee=3)
    first = pack(source, tmp_path / "out")
    write_sound(source / "bee" / "more.wav")
    second = pack(source, tmp_path / "out")
    assert (first.num_clips, second.num_clips) == (6, 7)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.parametrize("damage", ["card.json", "clips-00000.parquet"])
def test_a_damaged_data_set_is_packed_again(damage: str, tmp_path: Path) -> None:
    source = class_folders(tmp_path / "in", ant=2, bee=2)
    card = pack(source, tmp_path / "out")
    (tmp_path / "out" / damage).write_text("{")
    assert pack(source, tmp_path / "out") == card
    assert read_card(tmp_path / "out") == card


@pytest.mark.parametrize("name", ["thesis.txt", "card.json.bak", "clips-00000.parquet"])
def test_an_out_that_is_something_else_is_left_alone(name: str, sounds: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(DataError, match=rf"exists and is not a packed data set \(holds {name}\); name another folder"):
        pack(sounds, tmp_path)
    assert (tmp_path / name).read_text() == "mine"


def test_what_the_user_put_beside_the_shards_is_not_lost(tmp_path: Path) -> None:
    source = class_folders(tmp_path / "in", ant=2, bee=2)
    pack(source, tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    write_sound(source / "ant" / "more.wav")
    with pytest.raises(DataError, match=r"holds notes\.txt"):
        pack(source, tmp_path / "out")


def test_an_interrupted_pack_leaves_nothing_half_written(sounds: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 70:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(sounds, tmp_path / "out", progress=interrupt)
    assert not any(tmp_path.iterdir())


def test_home_may_be_written_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job's words pass no shell that would make it longer."""
    monkeypatch.setenv("HOME", str(tmp_path))
    table = manifest(tmp_path / "in", "path,label\na.wav,rain\nb.wav,wind\n")
    card = pack(Path("~/in"), Path("~/out"), Path("~/in") / table.name)
    assert read_card(tmp_path / "out") == card


def test_a_link_in_the_place_of_a_data_set_stays_one(tmp_path: Path) -> None:
    source = class_folders(tmp_path / "in", ant=2, bee=2)
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "set")
    for _ in range(2):
        pack(source, tmp_path / "out")
        assert (tmp_path / "out").is_symlink()
        assert (tmp_path / "disk" / "set" / "card.json").is_file()
        assert [path.name for path in (tmp_path / "disk").iterdir()] == ["set"]
        write_sound(source / "ant" / "more.wav")


def test_a_set_that_was_just_being_replaced_comes_back(tmp_path: Path) -> None:
    """Its name was taken from it, and the process died before the new one had it."""
    source = class_folders(tmp_path / "in", ant=2, bee=2)
    pack(source, tmp_path / "out")
    written = (tmp_path / "out" / "card.json").stat().st_mtime_ns
    (tmp_path / "out").rename(tmp_path / ".out.old-0123abcd")
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "out"):
        _ = 1 / 0
    assert (tmp_path / "out" / "card.json").stat().st_mtime_ns == written
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_what_a_killed_pack_left_is_swept_up_by_the_next(tmp_path: Path) -> None:
    source = class_folders(tmp_path / "in", ant=2, bee=2)
    left = tmp_path / ".out.part-0123abcd"
    left.mkdir()
    (left / "clips-00000.parquet").write_bytes(bytes(10))
    pack(source, tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / ".out.old-0123abcd")
    mine = [tmp_path / name for name in (".out.old-backup", ".out.old-1.part-0123abcd", ".out.part-mine")]
    for folder in mine:
        folder.mkdir()
    write_sound(source / "ant" / "more.wav")
    pack(source, tmp_path / "out")
    for folder in mine:
        folder.rmdir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


# Bad input


def bad_sounds(folder: Path) -> Path:
    source = class_folders(folder, ant=3, bee=3)
    (source / "ant" / "text.wav").write_text("a letter" * 100)
    (source / "bee" / "nothing.mp3").write_bytes(b"")
    soundfile.write(source / "bee" / "silent.wav", np.zeros(100), 8_000)
    soundfile.write(source / "bee" / "infinite.wav", np.full(9, np.inf), 8_000, subtype="FLOAT")
    return source


def test_bad_files_are_quarantined_with_their_reasons(tmp_path: Path) -> None:
    card = pack(bad_sounds(tmp_path / "in"), tmp_path / "out")
    assert (card.num_clips, card.num_rejected) == (6, 4)
    reasons = rejected(tmp_path / "out")
    assert set(reasons) == {"text.wav", "nothing.mp3", "silent.wav", "infinite.wav"}
    assert reasons["silent.wav"] == "silent: every sample is zero, as 16 bits of one channel"
    assert reasons["infinite.wav"] == "holds samples that are not finite numbers"
    assert reasons["text.wav"].startswith("cannot be decoded")


def test_strict_refuses_bad_files_and_writes_nothing(tmp_path: Path) -> None:
    source = bad_sounds(tmp_path / "in")
    with pytest.raises(
        DataError, match=r"text\.wav: cannot be decoded: .*; correct or remove it, or pack without --strict"
    ):
        pack(source, tmp_path / "out", strict=True)
    assert not (tmp_path / "out").exists()
    pack(source, tmp_path / "out")
    with pytest.raises(DataError, match=r"rejected\.csv: lists 4 unusable files"):
        pack(source, tmp_path / "out", strict=True)


def test_missing_files_are_quarantined_unless_all_are(tmp_path: Path) -> None:
    table = manifest(tmp_path / "in", "path,label\na.wav,x\nb.wav,y\ngone.wav,y\n")
    assert pack(tmp_path / "in", tmp_path / "out", table).num_rejected == 1
    assert rejected(tmp_path / "out") == {"gone.wav": "no such file"}
    table.write_text("path,label\ngone.wav,x\nlost.wav,y\n")
    with pytest.raises(
        DataError, match=r"2 of 2 files cannot be used, which leaves 0 classes of .*gone\.wav: no such file"
    ):
        pack(tmp_path / "in", tmp_path / "none", table)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label\na.wav,x\nb.wav,x\n", r"all clips have one class \(x\); label at least two classes"),
        ("path,label\n", "names no sound"),
        ("path,kind\na.wav,x\n", "has no column label; it needs label,path and has 'kind','path'; correct"),
        ("Path, label\na.wav,x\n", "has no column path; it needs label,path and has 'Path','label'; correct"),
        (
            "path,label\na.wav,owl,rain\n",
            "line 2: has 3 cells, and the first line names 2; separate several labels by ;",
        ),
        (
            "path,label,label\na.wav,owl,rain\n",
            "has several columns label; keep one, with several labels separated by ;",
        ),
        (
            "path;label\na.wav;x\n",
            "has no column label, path; it needs label,path, separated by commas and not by ';'$",
        ),
        ("path,label\na.wav,\n", "line 2: label is empty"),
        ("path,label\na.wav\n", "line 2: label is empty"),
        ("path,label\na.wav, ; \n", "line 2: label is empty"),
        ("path,label\na.wav,x\na.wav,y\n", "2 clips are called a; give each file a name of its own"),
        ("path,label,fold\na.wav,x,one\nb.wav,y,2\n", "line 2: fold=one is not a whole number"),
        ("path,label,fold\na.wav,x,70000\nb.wav,y,2\n", "line 2: fold=70000 is not within 0 to 32767"),
        ("path,label,fold\na.wav,x,1\nb.wav,y,\n", "fold is empty for 1 of 2 clips"),
        ("path,label,split\na.wav,x,train\nb.wav,y,dev\n", "line 3: split=dev is none of train, valid, test"),
        ("path,label,fold,group\na.wav,x,1,g\nb.wav,y,2,g\n", r"group=g is in several folds \(1, 2\)"),
        ("path,label,split,group\na.wav,x,train,g\nb.wav,y,test,g\n", r"group=g is in several splits \(test, train\)"),
        ("path,label\n../a.wav,x\nb.wav,y\n", r"line 2: \.\./a\.wav lies outside"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(text: str, message: str, tmp_path: Path) -> None:
    table = manifest(tmp_path / "in", text)
    with pytest.raises(DataError, match=message):
        pack(tmp_path / "in", tmp_path / "out", table)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("a.wav,1,0,dog\nb.wav,1,0,cat\n", "line 3: target=0 is both dog and cat"),
        ("a.wav,1,0,dog\nb.wav,1,1,dog\nc.wav,1,2,cat\n", "category=dog has several targets"),
        ("1-9-A-0.wav,1,0,dog\n2-9-B-0.wav,2,0,dog\n1-8-A-1.wav,1,1,cat\n", "group=9 is in several folds"),
    ],
)
def test_an_esc_table_that_contradicts_itself_is_refused(rows: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "esc.csv").write_text("filename,fold,target,category\n" + rows)
    with pytest.raises(DataError, match=message):
        pack(tmp_path, tmp_path / "out")


def test_two_esc_tables_are_one_too_many(tmp_path: Path) -> None:
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("filename,fold,target,category\n")
    with pytest.raises(
        DataError, match=r"2 tables look like ESC-50's \(a\.csv, b\.csv\); keep one, or name one by --m"
    ):
        pack(tmp_path, tmp_path / "out")
    write_sound(tmp_path / "audio" / "1-x.wav", 1)
    write_sound(tmp_path / "audio" / "2-y.wav", 2)
    (tmp_path / "b.csv").write_text("filename,fold,target,category\n1-x.wav,1,0,owl\n2-y.wav,2,1,cat\n")
    assert pack(tmp_path, tmp_path / "out", tmp_path / "b.csv").classes == ("owl", "cat")


def test_what_macos_leaves_in_an_archive_is_no_sound(tmp_path: Path) -> None:
    folder = class_folders(tmp_path / "in", owl=2, cat=2)
    for path in (folder / "__MACOSX" / "owl" / "._00.wav", folder / "owl" / "._00.wav"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"Mac OS X")
    card = pack(folder, tmp_path / "out")
    assert (card.classes, card.num_clips, card.num_rejected) == (("cat", "owl"), 4, 0)


def test_a_source_without_sounds_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"SOURCE=.*missing: no such folder"):
        pack(tmp_path / "missing", tmp_path / "out")
    with pytest.raises(DataError, match="no sounds found; expected an ESC-50-style CSV beside audio/"):
        pack(tmp_path, tmp_path / "out")
    with pytest.raises(DataError, match=r"--manifest=.*none\.csv: no such file"):
        pack(tmp_path, tmp_path / "out", tmp_path / "none.csv")


def test_a_table_in_another_encoding_is_told(tmp_path: Path) -> None:
    """As Excel saves it; its first line is plain, and a letter further down is not."""
    (tmp_path / "list.csv").write_bytes("path,label\na.wav,Bébé\nb.wav,Chien\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"list\.csv: cannot be read as a CSV in UTF-8 .*; save it as one"):
        pack(tmp_path, tmp_path / "out", tmp_path / "list.csv")


def test_a_binary_file_is_no_table(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_bytes(bytes(range(256)) * 4)
    with pytest.raises(DataError, match="has no column label, path"):
        pack(tmp_path, tmp_path / "out", tmp_path / "list.csv")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"data\.path=.*: no packed data set there; make one with `meamtm pack SOURCE "),
        ("{", r"card\.json cannot be read \(.*\); pack the data set again"),
        ('{"format": 1}', r"card\.json cannot be read"),
    ],
)
def test_a_card_that_is_not_there_or_not_readable_says_so(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "card.json").write_text(content)
    with pytest.raises(DataError, match=message):
        read_card(tmp_path)


def test_a_card_of_another_format_is_refused(packed: Path, tmp_path: Path) -> None:
    card = json.loads((packed / "card.json").read_text()) | {"format": 2}
    (tmp_path / "card.json").write_text(json.dumps(card))
    with pytest.raises(DataError, match="format 2 is not 1, which this version reads; pack it again"):
        read_card(tmp_path)


def test_a_data_set_is_read_by_uri(packed: Path) -> None:
    assert read_card(packed.as_uri()) == read_card(packed)
    assert Packed(packed.as_uri()).sounds(0) == Packed(str(packed)).sounds(0)
    with pytest.raises(DataError, match=r"data\.path=gopher://x/y: not a place that pyarrow can read"):
        read_card("gopher://x/y")


def test_others_may_read_what_was_packed(packed: Path) -> None:
    mask = os.umask(0)
    os.umask(mask)
    assert packed.stat().st_mode & 0o777 == 0o777 & ~mask
