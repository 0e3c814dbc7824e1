"""What a checkpoint is tested on: clips that it never heard, asked as it was taught, on whatever computes here."""

import csv
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny

from meamtm.config import override
from meamtm.data.cache import open_clips
from meamtm.data.pack import pack
from meamtm.errors import CheckpointError, DataError, MeamtmError
from meamtm.inference.predict import classify_files
from meamtm.training.checkpoint import load_model
from meamtm.training.evaluate import classify, evaluate
from meamtm.training.run import Outcome, run_here

SHORT = {"train.epochs": 1}


def packed_anew(sounds: Path, out: Path, label: str = "{category}", folds: str = "12345") -> Path:
    """The clips of some folds with other labels."""
    with (sounds / "synth.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["fold"] in folds]
    lines = [f"audio/{row['filename']},{label.format(**row)},{row['fold']}\n" for row in rows]
    out.parent.mkdir(parents=True, exist_ok=True)
    (out.parent / "list.csv").write_text("path,label,fold\n" + "".join(lines))
    pack(sounds, out, out.parent / "list.csv")
    return out


@pytest.fixture(scope="module")
def outcome(packed: Path, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """A run on folds 2 to 5."""
    return run_here(tiny(packed, cache_dir, tmp_path_factory.mktemp("runs"), SHORT))


def test_clips_that_trained_a_model_are_no_test_in_another_set_either(
    outcome: Outcome, sounds: Path, tmp_path: Path
) -> None:
    """A set that was packed anew since a label was wrong holds mostly what the model has heard."""
    anew = packed_anew(sounds, tmp_path / "anew")
    with pytest.raises(
        DataError, match=r"--data=.*anew: 80 of its 100 clips trained .* \(its own is 1\), or other data"
    ):
        evaluate(outcome.folder, str(anew))
    with pytest.raises(DataError, match=r"--fold=2: 20 of its 20 clips trained"):
        evaluate(outcome.folder, str(anew), 2)
    found = evaluate(outcome.folder, str(anew), 1)
    assert (found.part, len(found.clip_ids)) == ("fold 1", 20)
    unheard = packed_anew(sounds, tmp_path / "unheard", folds="1")
    assert len(evaluate(outcome.folder, str(unheard)).clip_ids) == 20
    assert len(evaluate(outcome.folder, str(unheard), 1).clip_ids) == 20, "though no other fold has any class"
    with pytest.raises(DataError, match=r"data.test_fold=2: .* has no such fold; choose one of 1"):
        evaluate(outcome.folder, str(unheard), 2)


def test_who_cannot_tell_what_a_model_has_heard_says_so(
    sounds: Path, cache_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mine = packed_anew(sounds, tmp_path / "mine")
    outcome = run_here(tiny(mine, cache_dir, tmp_path / "runs", SHORT))
    anew = packed_anew(sounds, tmp_path / "anew", folds="12")
    with pytest.raises(DataError, match=r"--data=.*anew: \d+ of its 40 clips trained"):
        evaluate(outcome.folder, str(anew))
    mine.rename(tmp_path / "moved")
    caplog.clear()
    assert len(evaluate(outcome.folder, str(anew)).clip_ids) == 40
    (said,) = [record.getMessage() for record in caplog.records if record.name == "meamtm.training.evaluate"]
    assert re.match(r"data\.path=.*mine: what .* was trained on is not there any more, so nobody can tell", said)
    with pytest.raises(
        DataError, match=r"data\.path=.*mine: no packed data set there.*, or name where .* with --data$"
    ):
        evaluate(outcome.folder)
    caplog.clear()
    assert evaluate(outcome.folder, str(tmp_path / "moved")).metrics == outcome.evaluation.metrics
    assert not caplog.records


def test_clips_that_chose_a_models_epoch_are_no_test_of_it(
    sounds: Path, packed: Path, cache_dir: Path, tmp_path: Path
) -> None:
    """Its accuracy there is the best of all epochs."""
    changes = {**SHORT, "data.valid_fold": 2}
    last, best = (
        run_here(tiny(packed, cache_dir, tmp_path / keep, {**changes, "train.keep": keep})) for keep in ("last", "best")
    )
    assert evaluate(last.folder, fold=2).part == "fold 2"
    with pytest.raises(
        DataError, match=r"--fold=2: 20 of its 20 clips trained .* or chose its epoch, .* \(its own is 1\)"
    ):
        evaluate(best.folder, fold=2)
    assert evaluate(best.folder, fold=1).metrics == best.evaluation.metrics
    chose = packed_anew(sounds, tmp_path / "chose", folds="2")
    with pytest.raises(DataError, match=r"--data=.*chose: 20 of its 20 clips trained .* or chose its epoch"):
        evaluate(best.folder, str(chose))


def test_a_set_in_the_place_of_the_one_that_trained_a_model_may_hold_what_it_heard(
    sounds: Path, cache_dir: Path, tmp_path: Path
) -> None:
    mine = packed_anew(sounds, tmp_path / "mine")
    outcome = run_here(tiny(mine, cache_dir, tmp_path / "runs", SHORT))
    shutil.rmtree(mine)
    packed_anew(sounds, mine, folds="1234")
    with pytest.raises(
        DataError, match=r"--data=.*mine: has the name of the data set that trained .* under another name"
    ):
        evaluate(outcome.folder, str(mine))
    with pytest.raises(CheckpointError, match=r"has changed since .* name data that it has not heard with --data"):
        evaluate(outcome.folder)


def test_labels_are_asked_for_as_they_were_taught(
    outcome: Outcome, sounds: Path, cache_dir: Path, tmp_path: Path
) -> None:
    several = packed_anew(sounds, tmp_path / "several", "{category};any")
    with pytest.raises(CheckpointError, match="10 classes"):
        evaluate(outcome.folder, str(several))
    swapped = packed_anew(sounds, tmp_path / "swapped", "{category};tone")
    with pytest.raises(CheckpointError, match=r"names one class for each clip, and clips of .* have several"):
        evaluate(outcome.folder, str(swapped))
    taught = run_here(tiny(swapped, cache_dir, tmp_path / "runs", SHORT))
    single = packed_anew(sounds, tmp_path / "single", folds="1")
    found = evaluate(taught.folder, str(single))
    assert found.confusion is None
    assert "test/map" in found.metrics
    saved, path = load_model(taught.folder), sounds / f"{found.clip_ids[0]}.wav"
    [answer] = classify_files(saved, [path])
    np.testing.assert_allclose(found.probability[0], answer.values, atol=1e-5)


def test_a_test_hears_all_of_a_long_clip_as_predict_does(sounds: Path, cache_dir: Path, tmp_path: Path) -> None:
    """A validation during training hears eight windows of it at most."""
    unheard = packed_anew(sounds, tmp_path / "unheard", folds="1")
    rest = packed_anew(sounds, tmp_path / "rest", folds="2345")
    changes = {**SHORT, "data.clip_s": 0.05, "mel.hop_ms": 5.0, "data.test_fold": None}
    outcome = run_here(tiny(rest, cache_dir, tmp_path / "runs", changes))
    found = evaluate(outcome.folder, str(unheard))
    paths = [sounds / f"{clip}.wav" for clip in found.clip_ids]
    answers = [answer.values for answer in classify_files(load_model(outcome.folder), paths)]
    np.testing.assert_allclose(found.probability, np.stack(answers), atol=1e-5)


def test_what_was_trained_in_parts_is_tested_in_parts(outcome: Outcome) -> None:
    """The memory that parts save would be taken by the first batch that a test hears."""
    saved = load_model(outcome.folder)
    clips = open_clips(saved.config.data, saved.config.mel.sample_rate_hz)
    heard: list[int] = []
    saved.model.encoder.register_forward_pre_hook(lambda _, images: heard.append(len(images[0])))
    answers = []
    for steps in (1, 3):
        config = override(saved.config, {"train.batch_size": 10, "train.accumulation_steps": steps})
        answers.append(classify(saved.model, config, clips, np.arange(20), multi_label=False)[0])
    assert heard == [10, 10, 4, 4, 4, 4, 4]
    torch.testing.assert_close(answers[0], answers[1], atol=1e-6, rtol=0)


def test_answers_that_are_no_numbers_are_no_answers(outcome: Outcome) -> None:
    saved = load_model(outcome.folder)
    clips = open_clips(saved.config.data, saved.config.mel.sample_rate_hz)
    with torch.no_grad():
        saved.model.encoder.head.weight[0] = math.nan
    message = r"^20 of 20 clips get answers that are no numbers, .*; lower optim\.lr \(0\.003\)"
    with pytest.raises(MeamtmError, match=message):
        classify(saved.model, saved.config, clips, np.arange(20), multi_label=False)


def test_what_gpus_trained_is_tested_on_what_is_here(outcome: Outcome, packed: Path) -> None:
    """The head node of a cluster, where a job's own process is, may have none."""
    asked = override(load_model(outcome.folder).config, {"scale.device": "cuda"})
    assert evaluate(outcome.checkpoint, here=asked).metrics == pytest.approx(evaluate(outcome.checkpoint).metrics)
