"""A checkpoint is whole or absent, needs nothing but itself, and never runs code."""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import pickle
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from meamtm.config import RunConfig, from_flat, load
from meamtm.errors import CheckpointError
from meamtm.model.transformer import AudioTransformer
from meamtm.training.checkpoint import (
    NUM_KEPT,
    Labels,
    checkpoint_name,
    load_model,
    load_state,
    newest,
    publish,
    read_labels,
    read_record,
    save,
)
from meamtm.training.memory import checkpoint_bytes
from meamtm.training.step import make_learner

CONFIG = from_flat(
    {
        "data.clip_s": 0.5,
        "mel.sample_rate_hz": 8_000,
        "mel.num_bands": 16,
        "encoder.stem_channels": [8],
        "encoder.heads": 1,
        "encoder.head_dim": 8,
        "encoder.depth": 1,
    }
)
LABELS = Labels(("dog", "café"), multi_label=False, digest="0123")
FILES = ["config.yaml", "labels.json", "metrics.json", "model.safetensors", "train_state.pt"]


def model(seed: int = 0) -> AudioTransformer:
    torch.manual_seed(seed)
    return AudioTransformer(CONFIG, 2).eval()


def write(
    run_folder: Path, cursor: tuple[int, int] = (1, 0), config: RunConfig = CONFIG, labels: Labels = LABELS
) -> Path:
    """Publishes a small checkpoint; its training state counts."""
    state = {"model": model(1).state_dict(), "counts": [1, 2], "losses": [torch.tensor(0.5)]}
    metrics = {"valid/accuracy": 0.25, "epoch": float(cursor[0])}
    return publish(save(config, labels, model().state_dict(), state, metrics, cursor=cursor), run_folder)


def reseal(folder: Path) -> None:
    """Makes metrics.json agree with changed files, as an attacker or another version would."""
    record = json.loads((folder / "metrics.json").read_text())
    record["files"] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in record["files"]}
    (folder / "metrics.json").write_text(json.dumps(record))


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    folder = write(tmp_path / "run")
    assert folder == tmp_path / "run" / "epoch-00001" == newest(tmp_path / "run")
    assert sorted(path.name for path in folder.iterdir()) == FILES
    saved = load_model(folder)
    assert (saved.folder, saved.config, saved.labels) == (folder, CONFIG, LABELS)
    assert saved.metrics == {"valid/accuracy": 0.25, "epoch": 1.0}
    assert not saved.model.training
    for name, value in model().state_dict().items():
        assert torch.equal(saved.model.state_dict()[name], value), name
    waveform = torch.randn(2, 4_000)
    assert torch.equal(saved.model(waveform), model()(waveform))
    state = load_state(folder)
    assert state["counts"] == [1, 2]
    assert torch.equal(state["model"]["encoder.positions.grid"], model(1).state_dict()["encoder.positions.grid"])


def test_files_that_have_settled_are_read_once_and_a_change_is_seen(tmp_path: Path) -> None:
    folder = write(tmp_path)
    weights = folder / "model.safetensors"
    with patch("hashlib.file_digest", wraps=hashlib.file_digest) as read:
        assert newest(tmp_path) == newest(tmp_path) == folder
        assert read.call_count == 8, "of what was written just now each file is read each time"
        for path in folder.iterdir():
            os.utime(path, (1, 1))
        assert newest(tmp_path) == newest(tmp_path) == folder
        assert read.call_count == 12
    flipped = bytearray(weights.read_bytes())
    flipped[-1] ^= 1
    weights.write_bytes(flipped)
    assert newest(tmp_path) is None


def test_a_model_in_use_needs_no_training_state(tmp_path: Path) -> None:
    folder = write(tmp_path)
    (folder / "train_state.pt").unlink()
    assert load_model(folder).folder == load_model(tmp_path).folder == folder
    with pytest.raises(CheckpointError, match=r"train_state\.pt is missing or damaged"):
        read_record(folder)
    assert newest(tmp_path) is None, "no run goes on from it"


def test_its_config_is_complete(tmp_path: Path) -> None:
    """So that later versions with other defaults read the same run."""
    text = (write(tmp_path) / "config.yaml").read_text()
    assert all(f"\n  {key}:" in text for key in ("lr", "num_bands", "drop_path", "batch_size", "clip_s"))
    assert load(tmp_path / "epoch-00001" / "config.yaml") == CONFIG


def test_a_run_folder_stands_for_its_newest_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, (1, 0))
    newer = write(tmp_path, (1, 7))
    assert load_model(tmp_path).folder == load_model(str(tmp_path)).folder == newer


def test_names_sort_by_age() -> None:
    """As long as there are fewer than 100,000 epochs."""
    cursors = [(0, 3), (1, 0), (1, 2), (1, 11), (2, 0), (10, 0), (99_999, 0)]
    names = [checkpoint_name(cursor) for cursor in cursors]
    assert names == sorted(names)
    assert names[1:3] == ["epoch-00001", "epoch-00001-batch-000002"]


def test_only_the_newest_are_kept_and_nothing_else_is_touched(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}")
    (tmp_path / "epoch-notes.txt").write_text("mine")
    (tmp_path / "test").mkdir()
    (tmp_path / "epoch-00002-mine").mkdir()
    for epoch in range(1, 5):
        write(tmp_path, (epoch, 0))
    assert NUM_KEPT == 2
    kept = ["epoch-00002-mine", "epoch-00003", "epoch-00004", "epoch-notes.txt", "metrics.jsonl", "test"]
    assert sorted(path.name for path in tmp_path.iterdir()) == kept


def test_the_newest_is_that_of_the_highest_number(tmp_path: Path) -> None:
    for cursor in [(99_998, 0), (99_999, 0), (100_000, 0), (100_000, 3)]:
        assert newest(tmp_path) != write(tmp_path, cursor) == newest(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch-100000", "epoch-100000-batch-000003"]


@pytest.mark.parametrize("damaged", [[50], [50, 52]])
def test_damaged_ones_do_not_count_among_those_that_are_kept(tmp_path: Path, damaged: list[int]) -> None:
    """However new they are: training goes on from the whole one before them."""
    for epoch in (40, 45):
        write(tmp_path, (epoch, 0))
    for epoch in damaged:
        shutil.copytree(tmp_path / "epoch-00045", tmp_path / f"epoch-{epoch:05d}")
        (tmp_path / f"epoch-{epoch:05d}" / "train_state.pt").write_bytes(b"torn")
    assert newest(tmp_path) == tmp_path / "epoch-00045"
    assert write(tmp_path, (47, 0)) == newest(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch-00045", "epoch-00047"]


def test_publishing_leaves_no_scratch_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    write(tmp_path / "run")
    assert list((tmp_path / "scratch").iterdir()) == []
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["epoch-00001"]


def test_what_a_killed_process_left_is_swept_up_after_a_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    for name, hours in {"meamtm-checkpoint-old": 25, "meamtm-checkpoint-new": 23, "other": 100}.items():
        (tmp_path / "scratch" / name).mkdir(parents=True)
        then_s = time.time() - 3_600 * hours
        os.utime(tmp_path / "scratch" / name, (then_s, then_s))
    (tmp_path / "run" / ".epoch-00009.part").mkdir(parents=True)
    write(tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "scratch").iterdir()) == ["meamtm-checkpoint-new", "other"]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["epoch-00001"]


def test_publishing_again_replaces_what_was_there(tmp_path: Path) -> None:
    (write(tmp_path) / "model.safetensors").write_bytes(b"torn")
    (tmp_path / ".epoch-00001.part").mkdir()  # of a publishing that was cut off
    folder = write(tmp_path)
    assert read_record(folder)["epoch"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["epoch-00001"]


def test_what_is_half_published_is_not_there(tmp_path: Path) -> None:
    write(tmp_path).rename(tmp_path / ".epoch-00001.part")
    assert newest(tmp_path) is None
    assert newest(tmp_path / "never") is None


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "flipped": lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])),
    "missing": lambda path: path.unlink(),
    "folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", [name for name in FILES if name != "metrics.json"])
def test_damage_to_any_file_is_seen_and_the_one_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: str
) -> None:
    before, damaged = write(tmp_path, (1, 0)), write(tmp_path, (2, 0))
    DAMAGE[damage](damaged / name)
    message = f"{damaged}: {name} is missing or damaged; use another checkpoint of the run"
    with caplog.at_level(logging.WARNING):
        assert newest(tmp_path) == before
    assert caplog.messages == [f"{message}; the one before is used"]
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        read_record(damaged)
    if (name, damage) == ("train_state.pt", "missing"):
        return  # a model in use may lack it
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        load_model(damaged)
    assert load_model(tmp_path).folder == before


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_damage_to_the_record_itself_is_seen(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    before, damaged = write(tmp_path, (1, 0)), write(tmp_path, (2, 0))
    DAMAGE[damage](damaged / "metrics.json")
    assert newest(tmp_path) == before
    assert str(damaged) in caplog.text


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ('{"format": 2}', "format 2 is not 1; use the version of meamtm that wrote it"),
        ('{"epoch": 3}', "format None is not 1; use the version of meamtm that wrote it"),
        ("[1]", r"format \[1\] is not 1"),
        ("{", r"metrics\.json cannot be read \(.*\); use another checkpoint of the run"),
        ("\udcff", r"metrics\.json cannot be read \(.*\); use another checkpoint of the run"),
        ('{"format": 1, "epoch": 2}', r"metrics\.json lacks batch, files, metrics; use another checkpoint of the run"),
        (
            '{"format": 1, "epoch": 1, "batch": 0, "metrics": {}, "files": {"../x": "0"}}',
            r"\.\./x is missing or damaged",
        ),
    ],
)
def test_a_record_of_another_kind_is_refused(tmp_path: Path, record: str, message: str) -> None:
    folder = write(tmp_path)
    (folder / "metrics.json").write_bytes(record.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)
    assert newest(tmp_path) is None


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_text("")
    for path in (tmp_path, tmp_path / "none", tmp_path / "weights.pt"):
        what = "not a checkpoint (no metrics.json)" if path.exists() else "no such folder"
        message = (
            f"{path}: {what}; name a run's folder, like runs/NAME, or one of its checkpoints, runs/NAME/epoch-00100"
        )
        with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
            load_model(path)


class Malice:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("is_plain_pickle", [True, False])
def test_code_in_a_training_state_does_not_run(tmp_path: Path, is_plain_pickle: bool) -> None:
    folder, target = write(tmp_path / "run"), tmp_path / "owned"
    if is_plain_pickle:
        (folder / "train_state.pt").write_bytes(pickle.dumps(Malice(target), protocol=2))
    else:
        torch.save({"model": Malice(target)}, folder / "train_state.pt")
    reseal(folder)
    load_model(folder)  # never opens it
    with pytest.raises(CheckpointError, match=r"train_state\.pt is damaged or holds more than data; use another"):
        load_state(folder)
    assert not target.exists()
    with contextlib.suppress(RuntimeError):  # a bare pickle lacks torch's mark, which is looked for after loading it
        torch.load(folder / "train_state.pt", weights_only=False)
    assert target.exists()  # so the malice was real


def test_code_in_the_weights_or_the_config_does_not_run(tmp_path: Path) -> None:
    folder, target = write(tmp_path / "run"), tmp_path / "owned"
    (folder / "model.safetensors").write_bytes(pickle.dumps(Malice(target), protocol=2))
    reseal(folder)
    with pytest.raises(CheckpointError, match="its weights and its config do not fit"):
        load_model(folder)
    (folder / "config.yaml").write_text(f"name: !!python/object/apply:pathlib.Path.touch [{target}]")
    reseal(folder)
    with pytest.raises(CheckpointError, match="its weights and its config do not fit"):
        load_model(folder)
    assert not target.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"classes": ["dog"], "multi_label": false, "digest": "0"}', "names 1 class; a classifier has two or more"),
        ('{"classes": [], "multi_label": false, "digest": "0"}', "names 0 class"),
        ('{"classes": ["a", "b"]}', r"labels\.json cannot be used \(KeyError\('multi_label'\)\)"),
        ("[]", r"labels\.json cannot be used"),
        ("{", r"labels\.json cannot be used"),
    ],
)
def test_labels_that_name_no_choice_are_refused(tmp_path: Path, text: str, message: str) -> None:
    folder = write(tmp_path)
    (folder / "labels.json").write_text(text)
    reseal(folder)
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)


def test_labels_that_do_not_fit_the_weights_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, labels=dataclasses.replace(LABELS, classes=("a", "b", "c")))
    assert read_labels(folder).classes == ("a", "b", "c")
    with pytest.raises(CheckpointError, match="its weights and its config do not fit"):
        load_model(folder)


def test_a_config_that_does_not_fit_the_weights_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path)
    text = (folder / "config.yaml").read_text()
    for wrong in (text.replace("depth: 1", "depth: 2"), text.replace("depth: 1", "depth: 0"), text + "unknown: 1\n"):
        (folder / "config.yaml").write_text(wrong)
        reseal(folder)
        with pytest.raises(CheckpointError, match="its weights and its config do not fit") as caught:
            load_model(folder)
        assert "\n" not in str(caught.value)


def test_a_checkpoint_needs_nothing_but_itself(tmp_path: Path) -> None:
    """Neither the run folder, nor the data set, nor the folder where it was trained."""
    shutil.copytree(write(tmp_path / "run"), tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "run")
    assert load_model(tmp_path / "elsewhere").labels == LABELS


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_size_that_was_announced_is_what_a_checkpoint_takes(tmp_path: Path, optimizer: str) -> None:
    config = from_flat({"encoder.stem_channels": [16, 32], "optim.name": optimizer})
    torch.manual_seed(0)
    learner = make_learner(config, AudioTransformer(config, 10), torch.device("cpu"), 1, multi_label=False)
    learner.model(torch.randn(1, 8_000)).sum().backward()
    learner.optimizer.step()
    assert learner.ema is not None
    state = {
        "model": learner.model.state_dict(),
        "optimizer": learner.optimizer.state_dict(),
        "ema": learner.ema.module.state_dict(),
    }
    folder = save(config, LABELS, learner.evaluated.state_dict(), state, {}, cursor=(1, 0))
    size_bytes = sum(path.stat().st_size for path in folder.iterdir())
    shutil.rmtree(folder.parent)
    assert size_bytes == pytest.approx(checkpoint_bytes(config), rel=0.02)
