"""A data set that came with a split of its own: its parts train, choose and test, and folds decide nothing."""

import csv
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml
from test_tune_study import write_study
from tiny import tiny

from meamtm.data.pack import pack
from meamtm.errors import ConfigError, DataError
from meamtm.training.evaluate import evaluate
from meamtm.training.run import run_here
from tune.plan import load_plan
from tune.study import run_study

WHOLE = {1: "train", 2: "train", 3: "train", 4: "valid", 5: "test"}
"""The part of each fold's clips."""
NO_TEST, NO_VALID = WHOLE | {5: "train"}, WHOLE | {4: "train"}


def packed_with(parts: Mapping[int, str], sounds: Path, folder: Path) -> Path:
    """The small sound set, with the split that a manifest gives it."""
    with (sounds / "synth.csv").open(encoding="utf-8") as file:
        lines = [f"{row['filename']},{row['category']},{parts[int(row['fold'])]}\n" for row in csv.DictReader(file)]
    (folder / "list.csv").write_text("path,label,split\n" + "".join(lines))
    pack(sounds / "audio", folder / "own", folder / "list.csv")
    return folder / "own"


def test_its_test_clips_test_and_no_fold_does(sounds: Path, cache_dir: Path, tmp_path: Path) -> None:
    packed = packed_with(WHOLE, sounds, tmp_path)
    outcome = run_here(tiny(packed, cache_dir, tmp_path / "runs", {"train.epochs": 1}))
    assert outcome.evaluation is not None
    assert outcome.evaluation.part == "its own split"
    with (sounds / "synth.csv").open(encoding="utf-8") as file:
        wanted = {Path(row["filename"]).stem for row in csv.DictReader(file) if row["fold"] == "5"}
    assert set(outcome.evaluation.clip_ids) == wanted
    assert "valid/accuracy" in outcome.metrics
    with pytest.raises(DataError, match=r"--fold=2: .*has a split of its own, so folds decide nothing; leave --fold"):
        evaluate(outcome.checkpoint, fold=2)


def test_without_test_clips_it_says_so_before_it_trains(sounds: Path, cache_dir: Path, tmp_path: Path) -> None:
    packed = packed_with(NO_TEST, sounds, tmp_path)
    config = tiny(packed, cache_dir, tmp_path / "runs", {"train.epochs": 1})
    with pytest.raises(ConfigError, match=r"data\.test_fold=1: .*no clip is for testing; set data\.test_fold=null"):
        run_here(config)
    assert not (tmp_path / "runs").exists()
    untested = run_here(tiny(packed, cache_dir, tmp_path / "runs", {"train.epochs": 1, "data.test_fold": None}))
    assert untested.evaluation is None
    with pytest.raises(DataError, match="no clip of its split is for testing; name other data by --data"):
        evaluate(untested.checkpoint)


@pytest.mark.parametrize(
    ("parts", "changes", "message"),
    [
        (WHOLE, {"inner_folds": [2, 3]}, r"inner_folds=\[2, 3\]: .* folds decide nothing; set inner_folds=\[\], and"),
        (NO_VALID, {}, "no clip of its split is for validation, on which a study chooses; pack it with some"),
        (NO_TEST, {}, r"data\.test_fold=1: .*no clip is for testing"),
        (WHOLE, {"train.keep": "best"}, r"train\.keep=best: a study compares trials by their last epoch, .*keep=last"),
    ],
    ids=["inner folds", "no valid clips", "no test clips", "best epoch"],
)
def test_a_study_that_could_not_choose_or_end_is_refused_before_it_begins(  # noqa: PLR0917
    parts: Mapping[int, str],
    changes: dict[str, object],
    message: str,
    sounds: Path,
    cache_dir: Path,
    tmp_path: Path,
    migrated: Path,
) -> None:
    path = write_study(tmp_path, packed_with(parts, sounds, tmp_path), cache_dir, migrated)
    settings = yaml.safe_load(path.read_text())
    settings["set"]["data.valid_fold"] = None
    path.write_text(yaml.safe_dump(settings))
    with pytest.raises(ConfigError, match=message):
        run_study(load_plan(path, [f"{key}={value}" for key, value in changes.items()]), print)
