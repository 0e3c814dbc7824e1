"""The training loop: it learns, ends, says that it is done, stops when asked and refuses what cannot work."""

import csv
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from tiny import PLAIN, Record, local, tiny

from meamtm.config import RunConfig, override, run_folder
from meamtm.data.cache import open_clips
from meamtm.data.pack import pack
from meamtm.data.synth import write_synth
from meamtm.errors import CheckpointError, ConfigError, DataError, MeamtmError
from meamtm.training.checkpoint import load_model, newest
from meamtm.training.context import LocalContext, Stopped
from meamtm.training.deterministic import deterministic
from meamtm.training.evaluate import classify, evaluate
from meamtm.training.metrics import scores
from meamtm.training.run import absolute, run_here, tags
from meamtm.training.train import train

GOLDEN = Path(__file__).parent / "golden" / "losses.txt"


def test_losses_equal_the_golden_ones(packed: Path, cache_dir: Path, tmp_path: Path) -> None:
    """A refactoring leaves them alone; a commit that changes them says why. The last digits are the processor's."""
    record = Record()
    config = tiny(packed, cache_dir, tmp_path, {"data.valid_fold": 2, "train.epochs": 6})
    train(config, local(config, record))
    losses = [f"{a:.4f} {b:.4f}" for a, b in zip(record.column("train/loss"), record.column("valid/loss"), strict=True)]
    expected = [line for line in GOLDEN.read_text().splitlines() if not line.startswith("#")]
    for found, wanted in zip(losses, expected, strict=True):
        assert [float(x) for x in found.split()] == pytest.approx([float(x) for x in wanted.split()], abs=2e-3), losses


class DeterminismRecord(Record):
    """Keeps whether torch was deterministic when an epoch ended."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        is_strict = torch.are_deterministic_algorithms_enabled()
        is_strict &= not torch.is_deterministic_algorithms_warn_only_enabled()
        super().log({**metrics, "deterministic": float(is_strict)}, step)


def test_deterministic_training_is_so_while_it_lasts_and_changes_nothing_on_a_cpu(
    packed: Path, cache_dir: Path, tmp_path: Path
) -> None:
    plain, strict = Record(), DeterminismRecord()
    for folder, changes, record in (("plain", {}, plain), ("strict", {"train.deterministic": True}, strict)):
        config = tiny(packed, cache_dir, tmp_path / folder, changes)
        train(config, local(config, record))
    assert strict.column("deterministic") == [1.0] * 4
    assert not torch.are_deterministic_algorithms_enabled()
    assert strict.column("train/loss") == plain.column("train/loss")


def test_an_operation_that_is_not_deterministic_is_told() -> None:
    problem = r"train.deterministic=true: put_ .*does not have a deterministic implementation.*; set it to false"
    with pytest.raises(ConfigError, match=problem), deterministic(True):
        torch.zeros(2).put_(torch.tensor([0]), torch.ones(1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_deterministic_training_repeats_itself_on_a_gpu(packed: Path, cache_dir: Path, tmp_path: Path) -> None:
    """With some 300 tokens a clip, so that attention adds several blocks of keys."""
    changes = {"train.deterministic": True, "train.precision": "auto", "encoder.stem": "patch"}
    changes |= {"encoder.patch": [4, 2], "encoder.stride": [4, 1]}
    losses = []
    for folder in ("first", "second"):
        config = tiny(packed, cache_dir, tmp_path / folder, changes)
        record = Record()
        train(config, LocalContext(run_folder(config), torch.device("cuda"), [record]))
        losses.append(record.column("train/loss"))
    assert losses[0] == losses[1]


def test_training_lowers_the_loss_and_beats_chance(packed: Path, cache_dir: Path, tmp_path: Path) -> None:
    record = Record()
    changes = {**PLAIN, "train.epochs": 25, "data.valid_fold": 2, "optim.lr": 1e-2, "train.checkpoint_s": 60}
    config = tiny(packed, cache_dir, tmp_path, changes)
    metrics = train(config, local(config, record))
    assert record.column("train/loss")[-1] < 0.75 * record.column("train/loss")[0]
    assert metrics["valid/accuracy"] > 0.2, record.column("valid/accuracy")


def test_an_epoch_of_several_passes_tells_the_mean_loss_of_a_clip(
    packed: Path, cache_dir: Path, tmp_path: Path
) -> None:
    changes = {**PLAIN, "encoder.stem": "patch", "encoder.patch": [8, 6], "encoder.stride": [8, 6], "optim.lr": 1e-9}
    plain, passes = (
        train(config, local(config))
        for name, least in (("plain", 1), ("passes", 12))
        for config in [
            tiny(packed, cache_dir, tmp_path / name, changes | {"train.epochs": 1, "train.epoch_batches": least})
        ]
    )
    assert passes["train/loss"] == pytest.approx(plain["train/loss"], rel=1e-5)


def test_a_finished_run_trains_no_more(packed: Path, cache_dir: Path, tmp_path: Path) -> None:
    config = tiny(packed, cache_dir, tmp_path)
    first, second = Record(), Record()
    metrics = train(config, local(config, first))
    assert train(config, local(config, second)) == metrics
    assert len(first.rows) == 4
    assert second.rows == []


def test_the_best_epoch_is_kept(packed: Path, cache_dir: Path, tmp_path: Path) -> None:
    changes = {"data.valid_fold": 2, "train.epochs": 8, "optim.lr": 3e-2, "train.ema_decay": 0, "train.keep": "best"}
    config, record = tiny(packed, cache_dir, tmp_path, changes), Record()
    metrics = train(config, local(config, record))
    accuracy = record.column("valid/accuracy")
    best = max(range(8), key=lambda epoch: (accuracy[epoch], epoch))
    assert accuracy[best] > accuracy[-1], "the last is the best, and shows nothing"
    assert (metrics["best/epoch"], metrics["best/accuracy"]) == (best + 1, accuracy[best])
    model, clips = load_model(run_folder(config)).model, open_clips(config.data, 8_000)
    probability, target = classify(model, config, clips, np.flatnonzero(clips.folds == 2), multi_label=False)
    assert scores(probability, target, multi_label=False)["accuracy"] == accuracy[best]


def test_without_clips_to_choose_on_no_epoch_is_the_best(packed: Path, cache_dir: Path, tmp_path: Path) -> None:
    config = tiny(packed, cache_dir, tmp_path, {"train.keep": "best"})
    with pytest.raises(ConfigError, match=r"train.keep=best: no clip to choose the epoch on .* set data.valid_fold"):
        run_here(config)
    assert not any(run_folder(config).glob("*.*"))


def test_asked_to_stop_it_saves_the_step_and_the_next_start_goes_on_from_it(
    packed: Path, cache_dir: Path, tmp_path: Path
) -> None:
    config = tiny(packed, cache_dir, tmp_path)
    steps = iter(range(100))
    with pytest.raises(Stopped, match="stopped after 1 epochs and 2 batches; the same command continues"):
        train(config, local(config, should_stop=lambda: next(steps) >= 5))
    assert newest(run_folder(config)).name == "epoch-00001-batch-000002"
    record = Record()
    train(config, local(config, record))
    assert record.column("epoch") == [2, 3, 4]


def test_a_loss_that_is_not_finite_names_its_step(packed: Path, cache_dir: Path, tmp_path: Path) -> None:
    config = tiny(
        packed,
        cache_dir,
        tmp_path,
        {
            "optim.name": "sgd",
            "optim.lr": 10,
            "optim.clip_grad": 0,
            "optim.schedule": "constant",
            "optim.warmup": 0,
            "train.epochs": 60,
        },
    )
    with pytest.raises(MeamtmError, match=r"train/loss is (nan|inf) at step \d of epoch \d+; lower optim.lr \(10\)"):
        train(
            override(config, {"encoder.stem": "patch", "encoder.patch": [8, 8], "encoder.stride": [8, 8]}),
            local(config),
        )


def test_another_data_set_of_the_same_name_is_not_continued(cache_dir: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        write_synth(tmp_path / f"raw{seed}", clips_per_class=5, clip_s=0.5, sample_rate_hz=8_000, seed=seed)
        pack(tmp_path / f"raw{seed}", tmp_path / str(seed) / "set")
    first, second = (tiny(tmp_path / str(seed) / "set", cache_dir, tmp_path / "runs") for seed in (0, 1))
    assert run_folder(first) == run_folder(second)
    train(first, local(first))
    with pytest.raises(CheckpointError, match=r"was trained on other data than .*set another name, or remove"):
        train(second, local(second))


def test_a_data_set_is_called_what_the_user_calls_it(
    packed: Path, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name is part of a run's, which is the same before and after paths are made absolute."""
    (tmp_path / "mine").symlink_to(packed)
    monkeypatch.chdir(tmp_path)
    config = tiny(Path("mine"), cache_dir, tmp_path / "runs", {"train.epochs": 1})
    assert run_here(config).folder == run_folder(config) == run_folder(absolute(config))


def test_normalised_training_clips_have_mean_0_and_deviation_1(packed: Path, cache_dir: Path, tmp_path: Path) -> None:
    """Those of each run that one process trains."""
    for fold, bands in ((1, 16), (2, 16), (2, 8)):
        config = tiny(packed, cache_dir, tmp_path, {"train.epochs": 1, "data.test_fold": fold, "mel.num_bands": bands})
        train(config, local(config))
        saved = load_model(newest(run_folder(config)))
        clips = open_clips(config.data, 8_000)
        waveforms = torch.stack(
            [torch.from_numpy(clips.waveform(i).copy()) for i in range(len(clips)) if clips.folds[i] != fold]
        )
        normal = saved.model.mel(waveforms.float() / 32_768)
        assert normal.mean().item() == pytest.approx(0, abs=1e-3)
        assert normal.std().item() == pytest.approx(1, abs=1e-3)


def test_a_long_recording_weighs_no_more_than_a_short_one_in_what_is_normal(cache_dir: Path, tmp_path: Path) -> None:
    """Training hears one crop of each."""
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 40_000)
    for name, sound in {"call": noise[:4_000], "quiet": 1e-3 * noise}.items():
        (tmp_path / "in" / name).mkdir(parents=True)
        for number in range(5):
            soundfile.write(tmp_path / "in" / name / f"{number}.wav", np.roll(sound, number), 8_000)
    pack(tmp_path / "in", tmp_path / "packed")
    config = tiny(tmp_path / "packed", cache_dir, tmp_path, {"train.epochs": 1})
    train(config, local(config))
    saved = load_model(newest(run_folder(config)))
    call, quiet = (
        saved.model.mel(torch.tensor(each * noise[None, :4_000]).float()).mean().item() for each in (1, 1e-3)
    )
    assert call + quiet == pytest.approx(0, abs=0.1), "as many clips of either"
    assert call > 0.9


def test_a_run_leaves_its_record_and_a_second_one_only_reads_it(packed: Path, cache_dir: Path, tmp_path: Path) -> None:
    config = tiny(packed, cache_dir, tmp_path)
    outcome = run_here(config)
    names = {path.name for path in outcome.folder.iterdir() if not path.name.startswith(".")}
    assert {"config.yaml", "metrics.jsonl", "curves.png", "test", "epoch-00003", "epoch-00004"} == names
    assert {path.name for path in (outcome.folder / "test").iterdir()} == {
        "metrics.json",
        "confusion.png",
        "per_class.csv",
        "predictions.csv",
    }
    written = (outcome.folder / "metrics.jsonl").stat().st_mtime_ns
    again = run_here(config)
    assert (outcome.folder / "metrics.jsonl").stat().st_mtime_ns == written
    assert again.evaluation.metrics == outcome.evaluation.metrics == evaluate(outcome.checkpoint).metrics


def test_the_test_fold_is_what_its_clips_say(packed: Path, cache_dir: Path, tmp_path: Path) -> None:
    config = tiny(packed, cache_dir, tmp_path, {"train.epochs": 1})
    evaluation = run_here(config).evaluation
    clips = open_clips(config.data, 8_000)
    assert set(evaluation.clip_ids) == {clips.ids[i] for i in range(len(clips)) if clips.folds[i] == 1}
    assert evaluation.confusion.sum() == len(evaluation.clip_ids)
    assert evaluate(run_folder(config), fold=1).part == "fold 1"


def test_a_single_clip_cannot_be_mixed(packed: Path, cache_dir: Path, tmp_path: Path) -> None:
    alone = tiny(packed, cache_dir, tmp_path, {"train.epochs": 1, "train.batch_size": 1})
    with pytest.raises(ConfigError, match=r"train\.batch_size=1 .* mix\.kind=between_class mixes two .* to 2 or more"):
        run_here(alone)
    assert run_here(override(alone, {"mix.kind": "none"})).evaluation is not None


@pytest.mark.parametrize(
    ("held_out", "fold", "remedy"),
    [((1, None), 3, "its own is 1"), ((1, 2), 3, "its own is 1 or 2"), ((None, None), 1, "none was held out")],
)
def test_clips_that_trained_a_model_are_no_test(  # noqa: PLR0917
    packed: Path, cache_dir: Path, tmp_path: Path, held_out: tuple[int | None, int | None], fold: int, remedy: str
) -> None:
    changes = {"data.test_fold": held_out[0], "data.valid_fold": held_out[1], "train.epochs": 1}
    run_here(config := tiny(packed, cache_dir, tmp_path, changes))
    with pytest.raises(DataError, match=rf"--fold={fold}: \d+ of its \d+ clips trained .*{remedy}.*--data"):
        evaluate(run_folder(config), fold=fold)


def test_a_finished_run_whose_data_have_moved_is_done(packed: Path, cache_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(packed, tmp_path / "here" / "sounds")
    changes = {"train.epochs": 1}
    found = run_here(tiny(tmp_path / "here" / "sounds", cache_dir, tmp_path / "runs", changes)).evaluation
    (tmp_path / "here").rename(tmp_path / "there")
    again = run_here(tiny(tmp_path / "there" / "sounds", cache_dir, tmp_path / "runs", changes)).evaluation
    assert found is not None
    assert again is not None
    assert again.metrics == found.metrics


def test_where_there_is_no_git_runs_have_no_commit(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert tags(override(RunConfig(), {"data.path": str(packed)}))["git_commit"] == "unknown"


def test_relative_places_are_resolved_where_the_run_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = absolute(override(RunConfig(), {"data.cache_dir": "waves", "data.path": "sounds", "runs_dir": "~/runs"}))
    assert config.data.cache_dir == str(tmp_path / "waves")
    assert absolute(RunConfig()).data.cache_dir == "~/.cache/meamtm", "each node and user has its own"
    assert config.data.path == str(tmp_path / "sounds")
    assert config.runs_dir == str(Path.home() / "runs")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_run_stopped_in_mid_epoch_goes_on_on_a_gpu(packed: Path, cache_dir: Path, tmp_path: Path) -> None:
    config, steps = tiny(packed, cache_dir, tmp_path, {"train.epochs": 2}), iter(range(1, 100))
    place = (run_folder(config), torch.device("cuda"))
    with pytest.raises(Stopped):
        train(config, LocalContext(*place, should_stop=lambda: next(steps) >= 2))
    assert train(config, LocalContext(*place))["epoch"] == 2


def test_another_data_set_may_order_the_same_classes_otherwise(
    sounds: Path, packed: Path, cache_dir: Path, tmp_path: Path
) -> None:
    """A manifest's classes are in the alphabet's order, those of ESC's CSV in that of its targets."""
    with (sounds / "synth.csv").open(encoding="utf-8") as file:
        lines = [f"{row['filename']},{row['category']},{row['fold']}\n" for row in csv.DictReader(file)]
    (tmp_path / "list.csv").write_text("path,label,fold\n" + "".join(lines))
    card = pack(sounds / "audio", tmp_path / "by-name", tmp_path / "list.csv")
    config = tiny(packed, cache_dir, tmp_path)
    own = run_here(config).evaluation
    other = evaluate(run_folder(config), str(tmp_path / "by-name"), fold=1)
    assert card.classes == tuple(sorted(own.classes)) != own.classes
    assert other.classes == own.classes
    assert other.metrics == pytest.approx(own.metrics)
    assert np.array_equal(other.confusion, own.confusion)
