"""The commands, one after the other, as the README tells a newcomer to type them."""

import csv
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
import soundfile
from command import Result, meamtm_command
from tiny import TINY

from meamtm.config import RunConfig, from_flat, known_keys, signature, write_yaml
from meamtm.data.packed import read_card
from meamtm.training.checkpoint import load_model, newest
from meamtm.training.evaluate import classify

NO_GROUPS = (
    "each clip counts as a recording of its own; where several come from one, name it in a manifest's column `group`, "
    "or folds will share it"
)


class World(NamedTuple):
    """A folder in which everything was done once, and what that printed."""

    folder: Path
    synth: Result
    pack: Result
    train: Result
    run_folder: Path
    classes: tuple[str, ...]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """The built-in sounds, packed, and a run on them; commands are typed in this folder."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        monkeypatch.setenv("COLUMNS", "80")
        places = {"name": "first", "data.path": "packed", "data.cache_dir": "cache"}
        write_yaml(folder / "run.yaml", {**TINY, **places, "train.epochs": 3})
        synth = meamtm_command("synth", "sounds", "--clips-per-class", 5, "--clip-s", 0.5)
        pack = meamtm_command("pack", "sounds", "packed")
        train = meamtm_command("train", "run.yaml")
        [run_folder] = (folder / "runs").iterdir()
        yield World(folder, synth, pack, train, run_folder, read_card("packed").classes)


def test_synth_writes_the_built_in_sounds(world: World) -> None:
    assert world.synth == (0, "50 clips of 0.5 s, 10 classes, 5 folds: sounds\n", "")
    assert len(list((world.folder / "sounds").rglob("*.wav"))) == 50


def test_pack_says_what_it_packed(world: World) -> None:
    classes = f"classes: {', '.join(world.classes)}"
    assert world.pack == (0, f"50 clips, 10 classes, 5 folds, 0.4 min: packed\n{classes}\n{NO_GROUPS}\n", "")
    again = meamtm_command("pack", "sounds", "packed")
    assert (again.code, again.out) == (0, world.pack.out)


def test_pack_says_what_a_model_will_not_hear_and_what_folds_may_share(tmp_path: Path) -> None:
    for label in ("wren", "owl"):
        (tmp_path / "in" / label).mkdir(parents=True)
        for number in range(2):
            noise = np.random.default_rng([number, len(label)]).normal(0, 0.1, 4_410)
            soundfile.write(tmp_path / "in" / label / f"{label}{number}.wav", noise, 44_100)
    done = meamtm_command("pack", tmp_path / "in", tmp_path / "out")
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines()[1:] == [
        "classes: owl, wren",
        NO_GROUPS,
        "recorded at up to 44,100 Hz; a model hears up to half of mel.sample_rate_hz, 8,000 Hz unless you raise that",
    ]


def test_pack_names_what_it_rejected(world: World, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    sounds = sorted((world.folder / "sounds").rglob("*.wav"))[:2]
    rows = [f"{path},{label}" for path, label in zip(["a.wav", "b.wav", "text.wav"], "xyx", strict=True)]
    for path, name in zip(sounds, ["a.wav", "b.wav"], strict=True):
        (tmp_path / "in" / name).write_bytes(path.read_bytes())
    (tmp_path / "in" / "text.wav").write_text("text")
    (tmp_path / "list.csv").write_text("\n".join(["path,label", *rows]))
    done = meamtm_command("pack", tmp_path / "in", tmp_path / "out", "--manifest", tmp_path / "list.csv")
    assert done.code == 0
    first, *more = done.out.splitlines()
    assert first.endswith(f"1 rejected (see {tmp_path / 'out' / 'rejected.csv'}): {tmp_path / 'out'}")
    assert more == ["classes: x, y", NO_GROUPS]


def test_show_prints_every_key_with_its_value_and_the_cost(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    shown = meamtm_command("show", "run.yaml", "optim.lr=3e-4")
    assert (shown.code, shown.err) == (0, "")
    rows = {cells[1].strip(): cells[2].strip() for line in shown.out.splitlines() if (cells := line.split("│"))[2:]}
    assert list(rows) == known_keys(RunConfig)
    assert rows["optim.lr"] == "0.0003"
    assert rows["encoder.stem_channels"] == "[8, 16]"
    cost = r"[\d,]+ parameters, 24 tokens, \d+ million MACs per clip, checkpoint 0\.\d MB"
    *_, sizes, memory = shown.out.splitlines()
    assert re.fullmatch(cost, sizes)
    assert re.fullmatch(r"training allocates \d MB at its peak, in each process, .*", memory)


def test_show_counts_the_teacher_where_there_is_one(world: World) -> None:
    def peak_mb(teacher: str) -> float:
        found = re.search(
            r"allocates ([\d,.]+) MB", meamtm_command("show", "run.yaml", f"distill.teacher={teacher}").out
        )
        assert found is not None
        return float(found[1])

    large = {"name": "large", "encoder.heads": 8, "encoder.head_dim": 64, "encoder.depth": 3, "train.epochs": 1}
    meamtm_command("train", "run.yaml", *(f"{key}={value}" for key, value in large.items()))
    weights_mb = 25  # 6.3 million in float32
    assert peak_mb("runs/large-*") > peak_mb("none") + weights_mb
    alone = meamtm_command("show", "run.yaml", "distill.teacher=runs/nobody")
    assert (alone.code, peak_mb("runs/nobody")) == (0, peak_mb("none"))
    assert "runs/nobody: no run there can teach this one" in alone.err
    assert alone.err.endswith("memory is given without a teacher\n")


def test_show_needs_no_data(world: World) -> None:
    shown = meamtm_command("show", "run.yaml", "data.path=elsewhere")
    assert shown.code == 0
    assert shown.err.startswith("data.path=elsewhere: no packed data set there")
    assert shown.err.endswith("the cost is given for 10 classes\n")


def test_train_tells_each_epoch_the_test_and_where_things_are(world: World) -> None:
    code, out, err = world.train
    assert code == 0
    epochs = [line for line in err.splitlines() if line.startswith("epoch ")]
    assert [re.sub(r"\d\.\d{3}", "#", line) for line in epochs] == [f"epoch {n}  train/loss #" for n in (1, 2, 3)]
    first, *rest = out.splitlines()
    assert re.fullmatch(r"test on fold 1: 10 clips, accuracy \d\.\d{4}, macro_f1 \d\.\d{4}, loss \d\.\d{4}", first)
    assert [name for name in world.classes if not any(name in line for line in rest)] == []
    assert rest[-2:] == [f"checkpoint  {world.run_folder / 'epoch-00003'}", f"run folder  {world.run_folder}"]


def test_a_run_folder_holds_the_whole_record(world: World) -> None:
    config = from_flat({**TINY, "train.epochs": 3, "data.path": "packed"})
    assert world.run_folder.name == f"first-{signature(config)}"
    found = {path.relative_to(world.run_folder).as_posix() for path in world.run_folder.rglob("*") if path.is_file()}
    assert {name for name in found if not name.startswith(("epoch-", ".lock"))} == {
        "config.yaml",
        "curves.png",
        "metrics.jsonl",
        "test/confusion.png",
        "test/metrics.json",
        "test/per_class.csv",
        "test/predictions.csv",
    }
    assert sorted(path.name for path in world.run_folder.glob("epoch-*")) == ["epoch-00002", "epoch-00003"]
    rows = [json.loads(line) for line in (world.run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 3]
    assert (
        rows[-1]["test/accuracy"] == json.loads((world.run_folder / "test/metrics.json").read_text())["test/accuracy"]
    )


def test_the_same_command_again_says_that_it_is_done(world: World) -> None:
    before = {path: path.stat().st_mtime_ns for path in world.run_folder.rglob("*")}
    with patch("meamtm.training.evaluate.classify", wraps=classify) as tested:
        again = meamtm_command("train", "run.yaml")
    assert again.code == 0
    assert tested.call_count == 1
    first, *rest = again.out.splitlines()
    assert first == "this run is done; nothing was trained. Change a setting or `name` for another one."
    assert rest == world.train.out.splitlines()
    assert {path: path.stat().st_mtime_ns for path in world.run_folder.rglob("*")} == before


def test_an_interrupted_run_says_so_and_the_same_command_finishes_it(world: World) -> None:
    words = ("train", "run.yaml", "name=long", "train.epochs=24")
    runs = world.folder / "runs"

    def interrupt() -> None:
        while not list(runs.glob("long-*/epoch-00002*")):
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=interrupt)
    thread.start()
    stopped = meamtm_command(*words)
    thread.join()
    assert signal.getsignal(signal.SIGINT) is before
    assert stopped.code == 1
    assert stopped.out == ""
    last = stopped.err.splitlines()[-1]
    assert re.fullmatch(r"meamtm: stopped after \d+ epochs and \d+ batches; the same command continues", last)
    done = meamtm_command(*words, "--resume")
    assert done.code == 0
    assert "continuing " in done.err
    [folder] = runs.glob("long-*")
    assert newest(folder) == folder / "epoch-00024"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [*range(1, 25), 24]


def test_resume_wants_something_to_continue(world: World) -> None:
    refused = meamtm_command("train", "run.yaml", "name=new", "--resume")
    assert refused.code == 2
    said = r"meamtm: --resume: (.*new-\w{8}) holds no checkpoint to continue; leave .*\n"
    found = re.fullmatch(said, refused.err)
    assert found is not None
    (Path(found[1]) / "epoch-00001").mkdir(parents=True)
    again = meamtm_command("train", "run.yaml", "name=new", "--resume")
    assert again.code == 2
    assert again.err.endswith(refused.err), "a damaged one is none either"


def test_evaluate_gives_what_train_gave(world: World) -> None:
    for place in (world.run_folder, world.run_folder / "epoch-00003"):
        found = meamtm_command("evaluate", place)
        assert (found.code, found.err) == (0, "")
        assert found.out.splitlines() == world.train.out.splitlines()[:-2]


def test_evaluate_takes_other_data_and_no_fold_that_trained(world: World, packed: Path) -> None:
    refused = meamtm_command("evaluate", world.run_folder, "--fold", 2)
    assert (refused.code, refused.out) == (2, "")
    assert "--fold=2: 10 of its 10 clips trained" in refused.err
    other = meamtm_command("evaluate", world.run_folder, "--data", packed)
    assert other.out.startswith("test on all clips: 100 clips, ")
    assert meamtm_command("evaluate", world.run_folder, "--data", packed, "--fold", 3).out.startswith(
        "test on fold 3: 20 clips, "
    )


def test_evaluate_tests_what_a_pattern_names_fold_by_fold_as_crossval_does(world: World, tmp_path: Path) -> None:
    for fold in (1, 2):
        for seed in (0, 1):
            meamtm_command("train", "run.yaml", "name=pairs", f"data.test_fold={fold}", f"train.seed={seed}")
    meamtm_command("train", "run.yaml", "name=pairs-final", "data.test_fold=null")
    crossed = meamtm_command("crossval", "run.yaml", "name=pairs", "--seeds", 2, "--folds", "1,2")
    found = meamtm_command("evaluate", "runs/pairs-*", "--out", tmp_path / "said.csv")
    assert found.code == 0, found.err
    assert re.fullmatch(
        r"runs/pairs-crossval-folds-1-2-seeds-2-\w+ is left out: it holds no checkpoint\n"
        r"runs/pairs-final-\w+/epoch-00003 is left out: data.test_fold=None: no clip is held out; .*\n"
        r"tested: (runs/pairs-\w+/epoch-00003(, |\n)){4}",
        found.err,
    )
    mean = re.search(r"test accuracy (\S+) ± ", crossed.out)
    together = re.search(r"ensemble of each fold's 2 seeds: accuracy (\S+)", crossed.out)
    assert mean is not None
    assert together is not None
    *_, alone, last = found.out.splitlines()
    assert alone == f"one at a time: accuracy {mean[1]}, the mean over 2 parts of the data"
    assert last.startswith(f"together: accuracy {together[1]}, macro_f1 ")
    rows = [line.replace("│", " ").split() for line in found.out.splitlines() if "fold" in line]
    assert [row[:4] for row in rows] == [["fold", "1", "10", "2"], ["fold", "2", "10", "2"]]
    (folder,) = (world.folder / "runs").glob("pairs-crossval-*")
    assert (tmp_path / "said.csv").read_bytes() == (folder / "predictions.csv").read_bytes()

    heard = meamtm_command("evaluate", "runs/pairs-*", "--fold", 1)  # by those that do not hold it out
    assert heard.code == 0, heard.err
    assert len(re.findall(r"is left out: --fold=1: 10 of its 10 clips trained", heard.err)) == 3
    assert [line.replace("│", " ").split()[:4] for line in heard.out.splitlines() if "fold" in line] == [rows[0][:4]]


def test_models_of_different_data_are_not_tested_together(world: World, tmp_path: Path, packed: Path) -> None:
    for name in ("some-a", "some-b"):
        shutil.copytree(world.run_folder, tmp_path / name)
    other = tmp_path / "others"
    shutil.copytree(packed, other)
    places = ["data.cache_dir=cache", f"data.path={other}", f"runs_dir={tmp_path}", "name=some"]
    meamtm_command("train", "run.yaml", *places)
    differ = meamtm_command("evaluate", tmp_path / "some-*")
    assert differ.code == 2
    assert re.search(
        r"meamtm: CHECKPOINT=.*some-\*: .*some-\S* and .*some-\S* are tested on different data; name runs of one data "
        r"set, or other data by --data\n$",
        differ.err,
    )
    overlap = meamtm_command("evaluate", tmp_path / "some-*", "--data", other)
    assert overlap.code == 2
    assert re.search(
        r"some-\S* is tested on (fold 1|all clips) and .*some-\S* on (fold 1|all clips), which", overlap.err
    )
    same = meamtm_command("evaluate", tmp_path / "some-*", "--data", other, "--fold", 1)
    assert same.code == 0, same.err
    assert "│ fold 1  │ 20    │ 3      │" in same.out
    none = meamtm_command("evaluate", tmp_path / "some-*", "--data", other, "--fold", 7)
    assert (none.code, none.out) == (2, "")
    assert none.err.splitlines()[-1].startswith("meamtm: data.test_fold=7: ")


def relabel(run: Path, **changes: object) -> None:
    """Changes what a run's newest checkpoint says of its labels."""
    checkpoint = newest(run)
    assert checkpoint is not None
    record = json.loads((checkpoint / "metrics.json").read_text())
    labels = json.loads((checkpoint / "labels.json").read_text())
    (checkpoint / "labels.json").write_text(json.dumps(labels | changes))
    record["files"]["labels.json"] = hashlib.sha256((checkpoint / "labels.json").read_bytes()).hexdigest()
    (checkpoint / "metrics.json").write_text(json.dumps(record))


def test_predict_names_sounds_and_says_why_it_cannot(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    sound = sorted((world.folder / "sounds").rglob("*.wav"))[0]
    for name in ("[bold]a.wav", "b.wav"):
        (tmp_path / name).write_bytes(sound.read_bytes())
    (tmp_path / "text.wav").write_text("text")
    done = meamtm_command("predict", world.run_folder, tmp_path)
    assert (done.code, done.err) == (0, "")
    bold, plain, text = (
        next(line.split("│") for line in done.out.splitlines() if name in line)
        for name in ("[bold]a.wav", "b.wav", "text.wav")
    )
    assert plain[2].strip() in world.classes
    assert bold[2:] == plain[2:]  # the same sound, whatever its file is called
    assert text[2].strip().startswith("cannot be decoded: ")


def test_predict_writes_a_csv(world: World, tmp_path: Path) -> None:
    done = meamtm_command("predict", world.run_folder, "sounds", "--out", tmp_path / "out.csv")
    assert done == (0, f"50 files: {tmp_path / 'out.csv'}\n", "")
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 50
    assert all(sum(float(row[name]) for name in world.classes) == pytest.approx(1, abs=1e-4) for row in rows)


def test_predict_names_each_window_of_a_long_recording(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    clip, rate_hz = soundfile.read(sorted((world.folder / "sounds").rglob("*.wav"))[0])
    soundfile.write(tmp_path / "long.wav", np.tile(clip, 3), rate_hz)
    (tmp_path / "text.wav").write_text("text")
    clip_s = len(clip) / rate_hz
    shown = meamtm_command("predict", world.run_folder, tmp_path, "--each-window").out
    named = [line.split("│")[2].strip() for line in shown.splitlines() if "long.wav" in line]
    assert len(named) == 3
    assert f"long.wav {clip_s:.1f}-{2 * clip_s:.1f} s" in shown
    done = meamtm_command("predict", world.run_folder, tmp_path, "--each-window", "--out", tmp_path / "out.csv")
    assert done.out == (
        f"3 windows of 1 files (1 could not be heard, and are listed with the reason): {tmp_path / 'out.csv'}\n"
    )
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        assert [row["class"] for row in csv.DictReader(file)] == [*named, ""]


def test_the_readme_names_sounds_from_python(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    sound = sorted((world.folder / "sounds").rglob("*.wav"))[0]
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.+?)```", readme, re.DOTALL)
    for ours, here in {"runs/mine-XXXXXXXX": world.run_folder, "field/morning.wav": sound}.items():
        assert ours in code
        code = code.replace(ours, str(here))
    samples, rate_hz = soundfile.read(sound)
    code = code.replace("48_000", str(rate_hz))
    names = {"samples": samples}
    exec(code, names)  # noqa: S102
    np.testing.assert_array_equal(names["values"], names["answer"].values, "in memory as in a file")
    said = capsys.readouterr().out
    assert said.startswith(f"{sound} {{")
    assert all(repr(name) in said for name in world.classes)


def test_predict_agrees_with_evaluate(world: World, tmp_path: Path) -> None:
    meamtm_command("predict", world.run_folder, "sounds", "--out", tmp_path / "out.csv")
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        named = {Path(row["path"]).stem: row["class"] for row in csv.DictReader(file)}
    with (world.folder / "sounds" / "synth.csv").open(newline="", encoding="utf-8") as file:
        truth = {Path(row["filename"]).stem: row for row in csv.DictReader(file)}
    held_out = [name for name, row in truth.items() if row["fold"] == "1"]
    accuracy = np.mean([named[name] == truth[name]["category"] for name in held_out])
    assert f"accuracy {accuracy:.4f}" in world.train.out


def test_predict_averages_the_runs_that_a_pattern_names(world: World, tmp_path: Path) -> None:
    for seed in (1, 2):
        meamtm_command("train", "run.yaml", f"train.seed={seed}", "name=several")
    folders = sorted((world.folder / "runs").glob("several-*"))
    (world.folder / "runs" / "several-crossval-0").mkdir()  # which holds no model
    shutil.copytree(folders[0] / "epoch-00002", world.folder / "runs" / "several-short")
    done = meamtm_command("predict", "runs/several-*", "sounds", "--out", tmp_path / "both.csv")
    assert done.code == 0, done.err
    checkpoints = ", ".join(f"runs/{folder.name}/epoch-00003" for folder in folders)
    assert sorted(done.err.splitlines()) == [
        f"ensemble of 2: {checkpoints}",
        "runs/several-crossval-0 is left out: it holds no checkpoint",
        "runs/several-short is left out: it is not trained to its end",
    ]
    (world.folder / "runs" / "several-best").symlink_to(folders[0])
    again = meamtm_command("predict", "runs/several-*", "sounds", "--out", tmp_path / "linked.csv")
    assert again.err.splitlines()[-1].startswith("ensemble of 2: "), "a link is no other model"
    (world.folder / "runs" / "several-best").unlink()
    short = meamtm_command("predict", "runs/several-short", "sounds", "--out", tmp_path / "short.csv")
    assert short.err == "runs/several-short is not trained to its end; the same command as before goes on\n"
    for number, folder in enumerate(folders):
        assert meamtm_command("predict", folder, "sounds", "--out", tmp_path / f"{number}.csv").err == ""
    first, second, both = (probabilities(tmp_path / f"{name}.csv", world.classes) for name in ("0", "1", "both"))
    assert np.abs(first - second).max() > 1e-3
    np.testing.assert_allclose(both, (first + second) / 2, atol=1e-6)

    copied = meamtm_command("predict", "runs/*/epoch-00003", "sounds", "--out", tmp_path / "copied.csv")
    assert copied.err.startswith(f"ensemble of {len(list(world.folder.glob('runs/*/epoch-00003')))}: runs/")

    for folder in (folders[1], folders[1] / "epoch-00003"):
        unquoted = meamtm_command("predict", folders[0], folder, "sounds")
        assert unquoted.code == 2
        assert unquoted.err == (
            f"meamtm: {folder}: is a run, and holds no sounds; the first word alone names runs, several of them as a "
            "pattern in quotes\n"
        )
    nothing = meamtm_command("predict", "~/runs/nobody-**", "sounds")
    place = Path("~/runs/nobody-**").expanduser()
    assert (nothing.code, nothing.err) == (
        2,
        f"meamtm: CHECKPOINT={place}: no trained run matches; name others, as runs/NAME-*\n",
    )


def test_runs_that_name_different_classes_are_not_averaged(world: World, tmp_path: Path) -> None:
    for name in ("some-a", "some-b"):
        shutil.copytree(world.run_folder, tmp_path / name)
    relabel(tmp_path / "some-b", classes=["another", *world.classes[1:]])
    done = meamtm_command("predict", tmp_path / "some-*", "sounds")
    assert done.code == 2
    assert re.fullmatch(
        r"meamtm: CHECKPOINT=.*some-\*: .*some-a\S* and .*some-b\S* differ in their classes, or in how many a clip may "
        r"have, so their answers cannot be averaged; name runs of one data set\n",
        done.err,
    )


def probabilities(path: Path, classes: tuple[str, ...]) -> np.ndarray:
    with path.open(newline="", encoding="utf-8") as file:
        return np.array([[float(row[name]) for name in classes] for row in csv.DictReader(file)])


def test_embed_writes_an_array_and_names_what_it_left_out(world: World, tmp_path: Path) -> None:
    (tmp_path / "text.wav").write_text("text")
    done = meamtm_command("embed", world.run_folder, "sounds", tmp_path / "text.wav", "--out", tmp_path / "out.npz")
    assert done.code == 0
    assert done.out == f"50 embeddings of width 16: {tmp_path / 'out.npz'}\n"
    assert done.err.startswith(f"{tmp_path / 'text.wav'}: cannot be decoded: ")
    with np.load(tmp_path / "out.npz") as found:
        assert found["embedding"].shape == (50, 16)
        assert found["embedding"].std(0).max() > 0


def test_a_checkpoint_that_was_moved_still_predicts(world: World, tmp_path: Path) -> None:
    (world.run_folder / "epoch-00002").rename(tmp_path / "moved")
    (tmp_path / "moved").rename(tmp_path / "renamed")
    saved = load_model(tmp_path / "renamed")
    assert saved.labels.classes == world.classes
    assert meamtm_command("predict", tmp_path / "renamed", "sounds", "--out", tmp_path / "out.csv").code == 0
    (tmp_path / "renamed").rename(world.run_folder / "epoch-00002")


def test_the_installed_command_exits_with_two_and_one_line(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("optim: {lrr: 1}")
    command = [str(Path(sys.executable).with_name("meamtm")), "show", "run.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "meamtm: optim.lrr=1: no such key; did you mean optim.lr?\n"


@pytest.mark.skipif(sys.platform != "linux", reason="nobody makes folders in /sys, not even root")
def test_a_place_that_is_closed_to_the_user_is_told_in_one_line() -> None:
    done = meamtm_command("synth", "/sys/meamtm")
    assert (done.code, done.out) == (2, "")
    assert re.fullmatch(
        r"meamtm: /sys/\S*meamtm\S*: .+; give this user the right to it, or name another place\n", done.err
    ), done.err
