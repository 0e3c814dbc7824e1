"""A run learns from another one of the same clips, which it finds by its folds, and from no other."""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from tiny import PLAIN, Record, tiny
from torch import Tensor

from meamtm.config import RunConfig, flatten, from_flat, override, run_folder, signature
from meamtm.crossval import cross_validate
from meamtm.data.pack import pack
from meamtm.data.synth import write_synth
from meamtm.distributed.side_by_side import largest_peak_bytes
from meamtm.errors import CheckpointError, ConfigError
from meamtm.model.transformer import AudioTransformer
from meamtm.training import memory
from meamtm.training.checkpoint import load_model, load_state, newest, read_record
from meamtm.training.context import Stopped
from meamtm.training.loss import distillation_losses, logits_together
from meamtm.training.memory import check_memory, peak_training_bytes
from meamtm.training.prepare import TrainingBatch
from meamtm.training.run import run_here
from meamtm.training.step import make_learner, train_step
from meamtm.training.teacher import Teacher, find_teachers, load_teacher
from tune.plan import load_plan
from tune.study import run_study

TEACHER = {"name": "teacher", "encoder.heads": 4, "train.epochs": 2}


def logits(seed: int, num_clips: int = 5, num_labels: int = 4) -> Tensor:
    return torch.randn(num_clips, num_labels, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def runs(packed: Path, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher for folds 1 and 2, one with another seed for fold 2, and one that is not finished."""
    folder = tmp_path_factory.mktemp("teachers")
    for changes in ({"data.test_fold": 1}, {"data.test_fold": 2}, {"data.test_fold": 2, "train.seed": 1}):
        run_here(tiny(packed, cache_dir, folder, TEACHER | changes))
    with pytest.raises(Stopped):
        run_here(tiny(packed, cache_dir, folder, TEACHER | {"data.test_fold": 3}), should_stop=lambda: True)
    return folder


def pupil(packed: Path, cache_dir: Path, folder: Path, runs: Path, **changes: Any) -> RunConfig:
    taught = {"name": "pupil", "distill.teacher": str(runs / "teacher-*")}
    return tiny(packed, cache_dir, folder, taught | {key.replace("__", "."): value for key, value in changes.items()})


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_distance_is_that_of_the_formula(temperature: float) -> None:
    ours, theirs = logits(0), logits(1)
    one = distillation_losses(ours, theirs, multi_label=False, temperature=temperature)
    p, q = (theirs / temperature).softmax(1), (ours / temperature).softmax(1)
    torch.testing.assert_close(one, temperature**2 * (p * (p / q).log()).sum(1))
    several = distillation_losses(ours, theirs, multi_label=True, temperature=temperature)
    p, q = (theirs / temperature).sigmoid(), (ours / temperature).sigmoid()
    binary = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    torch.testing.assert_close(several, temperature**2 * binary.sum(1))


@pytest.mark.parametrize("multi_label", [False, True])
def test_who_says_what_the_teacher_says_has_nothing_to_learn(multi_label: bool) -> None:
    ours = (1e3 * logits(2)).requires_grad_()  # as sure as logits can be
    distance = distillation_losses(ours, ours.detach(), multi_label=multi_label, temperature=1.0)
    torch.testing.assert_close(distance, torch.zeros_like(distance))
    assert torch.autograd.grad(distance.sum(), ours)[0].abs().max() < 1e-9


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_several_say_the_mean_of_their_probabilities(temperature: float) -> None:
    answers = [logits(seed) for seed in range(3)]
    one = logits_together(answers, multi_label=False, temperature=temperature)
    expected = torch.stack([(each / temperature).softmax(1) for each in answers]).mean(0)
    torch.testing.assert_close((one / temperature).softmax(1), expected)
    several = logits_together(answers, multi_label=True, temperature=temperature)
    expected = torch.stack([(each / temperature).sigmoid() for each in answers]).mean(0)
    torch.testing.assert_close((several / temperature).sigmoid(), expected)


@pytest.mark.parametrize("multi_label", [False, True])
def test_several_that_are_as_sure_as_logits_can_be_stay_finite(multi_label: bool) -> None:
    sure = 1e4 * logits(3).float()
    for answers in ([sure, sure], [sure, -sure]):
        assert logits_together(answers, multi_label=multi_label, temperature=1.0).isfinite().all()


def test_a_step_weighs_labels_and_teacher(packed: Path, cache_dir: Path, tmp_path: Path) -> None:
    """The teacher hears the clip as it is mixed, and its weights stay."""
    flat = {**PLAIN, "distill.teacher": "elsewhere", "distill.weight": 0.3, "distill.temperature": 2.0}
    config = tiny(packed, cache_dir, tmp_path, flat)
    torch.manual_seed(0)
    model, teacher = AudioTransformer(config, 3), AudioTransformer(override(config, {"mel.num_bands": 24}), 3).eval()
    for weight in teacher.encoder.head.parameters():  # which begins at zero
        torch.nn.init.normal_(weight)
    waveform, target = 0.1 * torch.randn(4, config.clip_samples), torch.eye(3)[[0, 1, 2, 0]]
    mask = torch.zeros(4, 16, config.num_frames, dtype=torch.bool)
    mask[:, :5] = True
    before = {name: weight.clone() for name, weight in teacher.state_dict().items()}
    device = torch.device("cpu")
    learner = make_learner(config, model, device, 10, multi_label=False, teachers=[Teacher(teacher, "elsewhere", "0")])
    ours = model.train()(waveform, mask)
    labels = F.cross_entropy(ours, target, label_smoothing=0.1, reduction="none")
    taught = distillation_losses(ours, teacher(waveform), multi_label=False, temperature=2.0)
    train_step(learner, TrainingBatch(waveform, target, mask, 4, seed=0))
    torch.testing.assert_close(learner.losses[0], (0.7 * labels + 0.3 * taught).sum().detach())
    assert all(torch.equal(weight, before[name]) for name, weight in teacher.state_dict().items())
    assert all(weight.grad is None for weight in teacher.parameters())


def test_a_pupil_comes_to_say_what_its_teacher_says(packed: Path, cache_dir: Path, tmp_path: Path, runs: Path) -> None:
    """Also where it hears no label."""
    changes = {"distill__weight": 1.0, "train__epochs": 30, "train__checkpoint_s": 60}
    taught = run_here(pupil(packed, cache_dir, tmp_path, runs, **changes))
    untaught = run_here(tiny(packed, cache_dir, tmp_path, {"train.epochs": 30, "train.checkpoint_s": 60}))
    (found,) = find_teachers(pupil(packed, cache_dir, tmp_path, runs))
    teacher = load_teacher(found, torch.device("cpu"))
    noise = 0.1 * torch.randn(64, 4_000, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = teacher.model(noise)
        found = [load_model(run.checkpoint).model(noise) for run in (taught, untaught)]
    near, far = (
        float(distillation_losses(each, expected, multi_label=False, temperature=1.0).mean()) for each in found
    )
    assert near < 0.5 * far


def test_a_teacher_that_ends_while_its_pupil_guesses_is_not_sought(
    packed: Path, cache_dir: Path, tmp_path: Path, runs: Path
) -> None:
    """The pupil found the only one when it began; another that could teach is there when labels are learnt."""
    shutil.copytree(runs, tmp_path / "teachers")
    (one,) = (path for path in (tmp_path / "teachers").glob("teacher-*") if folds_of(path) == 1)
    begun = pupil(packed, cache_dir, tmp_path, tmp_path / "teachers", pretrain__epochs=2, train__epochs=1)

    class Late(Record):
        def log(self, metrics: Mapping[str, float], step: int) -> None:
            super().log(metrics, step)
            if step == 1:
                shutil.copytree(one, one.with_name("teacher-other"))

    late = Late()
    outcome = run_here(begun, (late,))
    assert late.column("step") == [1, 2, 3]
    [taught_by] = read_record(outcome.checkpoint)["teachers"]
    assert taught_by["checkpoint"].startswith(str(one))


def folds_of(run: Path) -> int:
    return yaml.safe_load((run / "config.yaml").read_text())["data"]["test_fold"]


def test_a_run_that_was_stopped_goes_on_with_its_teacher(
    packed: Path, cache_dir: Path, tmp_path: Path, runs: Path
) -> None:
    whole, stopped = (pupil(packed, cache_dir, tmp_path / name, runs) for name in ("whole", "stopped"))
    answers = iter([False] * 5 + [True])
    with pytest.raises(Stopped):
        run_here(stopped, should_stop=lambda: next(answers))
    one, two = run_here(whole), run_here(stopped)
    for name, weight in load_model(one.checkpoint).model.state_dict().items():
        torch.testing.assert_close(weight, load_model(two.checkpoint).model.state_dict()[name], rtol=0, atol=0)


def test_a_run_does_not_go_on_with_another_teacher(packed: Path, cache_dir: Path, tmp_path: Path, runs: Path) -> None:
    config = pupil(packed, cache_dir, tmp_path, tmp_path)
    shutil.copytree(run_folder(tiny(packed, cache_dir, runs, TEACHER)), tmp_path / "teacher-1")
    answers = iter([False] * 5 + [True])
    with pytest.raises(Stopped):
        run_here(config, should_stop=lambda: next(answers))
    shutil.rmtree(tmp_path / "teacher-1")
    run_here(tiny(packed, cache_dir, tmp_path, TEACHER | {"optim.lr": 1e-3}))
    with pytest.raises(
        CheckpointError,
        match=r"teacher-1/epoch-00002 has taught this run so far, and no run there has its weights now;",
    ):
        run_here(config)


def test_a_run_that_an_earlier_version_left_goes_on_with_its_teacher(
    packed: Path, cache_dir: Path, tmp_path: Path, runs: Path
) -> None:
    """It kept the one that there could be under a key of its own."""
    config = pupil(packed, cache_dir, tmp_path, runs)
    answers = iter([False] * 5 + [True])
    with pytest.raises(Stopped):
        run_here(config, should_stop=lambda: next(answers))
    checkpoint = newest(run_folder(config))
    assert checkpoint is not None
    record = json.loads((checkpoint / "metrics.json").read_text())
    (teacher,) = record.pop("teachers")
    torch.save(load_state(checkpoint) | {"teacher": teacher}, checkpoint / "train_state.pt")
    record["files"]["train_state.pt"] = hashlib.sha256((checkpoint / "train_state.pt").read_bytes()).hexdigest()
    (checkpoint / "metrics.json").write_text(json.dumps(record))
    one = run_here(config)
    assert read_record(one.checkpoint)["teachers"] == [teacher]


def test_the_teacher_has_the_run_s_folds_and_its_seed_where_there_are_several(
    packed: Path, cache_dir: Path, runs: Path
) -> None:
    def taught_by(**changes: Any) -> tuple[int | None, int]:
        (found,) = find_teachers(pupil(packed, cache_dir, runs, runs, **changes))
        teacher = load_model(found).config
        return teacher.data.test_fold, teacher.train.seed

    assert taught_by(data__test_fold=1) == taught_by(data__test_fold=1, train__seed=7) == (1, 0)
    assert taught_by(data__test_fold=2) == (2, 0)
    assert taught_by(data__test_fold=2, train__seed=1) == (2, 1)
    assert find_teachers(tiny(packed, cache_dir, runs)) == []
    assert len(find_teachers(pupil(packed, cache_dir, runs, runs, name="teacher"))) == 1


def test_an_ensemble_is_all_that_have_the_run_s_folds(
    packed: Path, cache_dir: Path, runs: Path, tmp_path: Path
) -> None:
    """What is there twice counts once, and who is left out is told."""
    shutil.copytree(runs, tmp_path / "teachers")
    config = pupil(packed, cache_dir, tmp_path, tmp_path / "teachers", data__test_fold=2, distill__ensemble=True)
    found = find_teachers(config)
    assert sorted(load_model(path).config.train.seed for path in found) == [0, 1]
    assert len(find_teachers(override(config, {"data.test_fold": 1}))) == 1
    (tmp_path / "teachers" / "teacher-zz-link").symlink_to(found[0].parent)
    shutil.copytree(found[1].parent, tmp_path / "teachers" / "teacher-zz-copy")
    assert find_teachers(config) == found


def test_a_pupil_of_an_ensemble_goes_on_with_those_that_it_began_with(
    packed: Path, cache_dir: Path, tmp_path: Path, runs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(runs, tmp_path / "teachers")
    together = {"data__test_fold": 2, "train__seed": 5, "distill__ensemble": True}
    whole, config = (
        pupil(packed, cache_dir, tmp_path / name, tmp_path / "teachers", **together) for name in ("whole", "stopped")
    )
    expected = [str(path) for path in find_teachers(config)]
    unfinished = TEACHER | {"data.test_fold": 2, "train.seed": 9}
    with pytest.raises(Stopped):
        run_here(tiny(packed, cache_dir, tmp_path / "teachers", unfinished), should_stop=lambda: True)
    with caplog.at_level(logging.INFO, "meamtm"):
        one = run_here(whole)
    assert f"taught by {', '.join(expected)}" in caplog.messages
    (left_out,) = [message for message in caplog.messages if message.startswith("and not by ")]
    assert re.fullmatch(r"and not by teacher-\w+ is not trained to its end", left_out)
    answers = iter([False] * 5 + [True])
    with pytest.raises(Stopped):
        run_here(config, should_stop=lambda: next(answers))
    late = run_here(tiny(packed, cache_dir, tmp_path / "teachers", TEACHER | {"data.test_fold": 2, "train.seed": 2}))
    assert late.checkpoint in find_teachers(override(config, {"name": "another"}))
    two = run_here(config)
    for outcome in (one, two):
        assert [known["checkpoint"] for known in read_record(outcome.checkpoint)["teachers"]] == expected
    for name, weight in load_model(one.checkpoint).model.state_dict().items():
        torch.testing.assert_close(weight, load_model(two.checkpoint).model.state_dict()[name], rtol=0, atol=0)


def test_a_pupil_of_an_ensemble_does_not_go_on_without_one_of_them(
    packed: Path, cache_dir: Path, tmp_path: Path, runs: Path
) -> None:
    shutil.copytree(runs, tmp_path / "teachers")
    config = pupil(packed, cache_dir, tmp_path, tmp_path / "teachers", data__test_fold=2, distill__ensemble=True)
    answers = iter([False] * 5 + [True])
    with pytest.raises(Stopped):
        run_here(config, should_stop=lambda: next(answers))
    gone = find_teachers(config)[0].parent
    gone.rename(tmp_path / "away")
    with pytest.raises(CheckpointError, match=f"{gone.name}/epoch-00002 has taught this run so far, .* move it back"):
        run_here(config)
    (tmp_path / "away").rename(tmp_path / "teachers" / "teacher-another")  # it may come back under another name
    assert run_here(config).metrics["epoch"] == 4


def test_a_step_learns_from_the_mean_of_its_teachers(packed: Path, cache_dir: Path, tmp_path: Path) -> None:
    flat = {**PLAIN, "distill.teacher": "elsewhere", "distill.weight": 1.0, "distill.ensemble": True}
    config = tiny(packed, cache_dir, tmp_path, flat)
    torch.manual_seed(0)
    model, *teachers = (AudioTransformer(config, 3) for _ in range(3))
    for teacher in teachers:
        for weight in teacher.eval().encoder.head.parameters():  # which begins at zero
            torch.nn.init.normal_(weight)
    waveform = 0.1 * torch.randn(4, config.clip_samples)
    named = [Teacher(teacher, "elsewhere", str(number)) for number, teacher in enumerate(teachers)]
    learner = make_learner(config, model, torch.device("cpu"), 10, multi_label=False, teachers=named)
    mean = torch.stack([teacher(waveform).softmax(1) for teacher in teachers]).mean(0)
    expected = distillation_losses(model.train()(waveform), mean.log(), multi_label=False, temperature=1.0)
    train_step(learner, TrainingBatch(waveform, torch.eye(3)[[0, 1, 2, 0]], None, 4, seed=0))
    torch.testing.assert_close(learner.losses[0], expected.sum().detach())


def test_a_run_does_not_teach_itself(packed: Path, cache_dir: Path, tmp_path: Path, runs: Path) -> None:
    (tmp_path / "teacher-1").symlink_to(run_folder(tiny(packed, cache_dir, runs, TEACHER)))
    config = pupil(packed, cache_dir, tmp_path, tmp_path, name="teacher-2")
    before = find_teachers(config)
    own = run_here(config)
    assert own.folder.match("teacher-2-*")
    assert find_teachers(config) == before
    assert [path.parent for path in before] == [tmp_path / "teacher-1"]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"data__test_fold": 4},
            r"\(teacher-\w+ was trained on other clips \(data.test_fold=\d data.valid_fold=None\); .*; and 1 more\);",
        ),
        ({"data__valid_fold": 3}, "train one with data.test_fold=1 data.valid_fold=3 first"),
        ({"data__test_fold": 3}, r"teacher-\w+ is not trained to its end"),
        (
            {"data__test_fold": 2, "train__seed": 5},
            r"teacher-\w+, teacher-\w+ can each teach this run; name one of them, or set distill.ensemble=true",
        ),
        ({"mel__sample_rate_hz": 16_000}, r"teacher-\w+ has mel.sample_rate_hz=8000, not 16000;"),
        ({"distill__teacher": "nowhere/at-all"}, r"^distill.teacher=.*at-all: no run there can teach this one; train"),
        ({"distill__teacher": "/"}, r"^distill.teacher=/: no run there can teach this one; train"),
    ],
)
def test_who_cannot_teach_is_told_before_anything_is_written(  # noqa: PLR0917
    packed: Path, cache_dir: Path, tmp_path: Path, runs: Path, changes: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        run_here(pupil(packed, cache_dir, tmp_path, runs, **changes))
    assert not any(tmp_path.iterdir())


def test_a_teacher_of_other_clips_is_refused(cache_dir: Path, tmp_path: Path, runs: Path) -> None:
    write_synth(tmp_path / "sounds", clips_per_class=10, clip_s=0.5, sample_rate_hz=8_000, seed=1)
    pack(tmp_path / "sounds", tmp_path / "packed")
    with pytest.raises(ConfigError, match=r"teacher-\w+ was trained on other data than .*packed"):
        run_here(pupil(tmp_path / "packed", cache_dir, tmp_path / "runs", runs))


def test_a_config_that_no_longer_builds_is_named(packed: Path, cache_dir: Path, tmp_path: Path, runs: Path) -> None:
    found = newest(run_folder(tiny(packed, cache_dir, runs, TEACHER)))
    assert found is not None
    old = tmp_path / "runs" / "teacher-old" / found.name
    shutil.copytree(found, old)
    (old / "config.yaml").write_text((old / "config.yaml").read_text().replace("heads:", "horns:"))
    record = json.loads((old / "metrics.json").read_text())
    record["files"]["config.yaml"] = hashlib.sha256((old / "config.yaml").read_bytes()).hexdigest()
    (old / "metrics.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=r"can teach this one \(teacher-old encoder.horns=4: no such key"):
        find_teachers(pupil(packed, cache_dir, tmp_path, tmp_path / "runs"))


def test_a_cross_validation_has_a_teacher_for_each_fold_or_does_not_begin(
    packed: Path, cache_dir: Path, tmp_path: Path, runs: Path
) -> None:
    config = pupil(packed, cache_dir, tmp_path, runs, train__epochs=1)
    with pytest.raises(ConfigError, match=r"data.test_fold=4"):
        cross_validate(config, folds=[1, 2, 4])
    assert not any(tmp_path.iterdir())
    assert [row.fold for row in cross_validate(config, folds=[1]).rows] == [1]


def test_a_cross_validation_may_teach_another_of_the_same_name(packed: Path, cache_dir: Path, tmp_path: Path) -> None:
    """What it found, and other pupils, match the pattern too."""
    teacher = tiny(packed, cache_dir, tmp_path, {"name": "same", "train.epochs": 1})
    cross_validate(teacher, folds=[1])
    learner = override(teacher, {"distill.teacher": str(tmp_path / "same-*")})
    for changes in ({}, {"distill.weight": 0.9}, {"train.seed": 1}):
        cross_validate(override(learner, changes), folds=[1])
    assert len(list(tmp_path.glob("same-*"))) == 8  # four runs and what each cross-validation found
    for seed in (0, 1):
        found = find_teachers(override(learner, {"distill.weight": 0.8, "train.seed": seed}))
        assert [path.parent for path in found] == [run_folder(teacher)]


def test_a_pupil_teaches_where_it_is_named(packed: Path, cache_dir: Path, tmp_path: Path, runs: Path) -> None:
    first = run_here(pupil(packed, cache_dir, tmp_path, runs))
    for teacher in (first.folder, first.checkpoint):
        second = pupil(packed, cache_dir, tmp_path, runs, name="second", distill__teacher=str(teacher))
        assert find_teachers(second) == [first.checkpoint]


def test_a_study_looks_for_every_teacher_before_its_first_trial(
    packed: Path, cache_dir: Path, tmp_path: Path, runs: Path
) -> None:
    """There are teachers of whole runs and none that spares an inner fold, and the other way round."""
    folds = {"data.test_fold": 1, "data.valid_fold": 2}
    run_here(tiny(packed, cache_dir, tmp_path / "inner", TEACHER | folds))
    for there, lacking in ((runs, "data.valid_fold=2"), (tmp_path / "inner", "data.valid_fold=null")):
        flat = flatten(pupil(packed, cache_dir, tmp_path / "runs", there, data__valid_fold=2))
        study = {"name": "taught", "trials": 1, "studies_dir": str(tmp_path / "studies"), "set": flat}
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(study | {"space": {"optim.lr": {"uniform": [1e-4, 1e-2]}}}))
        with pytest.raises(ConfigError, match=f"train one with data.test_fold=1 {lacking} first"):
            run_study(load_plan(tmp_path / "study.yaml"), print)
        assert not (tmp_path / "studies").exists()


def test_where_a_teacher_lies_does_not_change_the_signature() -> None:
    def signed(teacher: str) -> str:
        return signature(from_flat({"distill.teacher": teacher}))

    assert signed("runs/esc10-*") == signed("/mnt/runs/esc10-*")
    assert len({signed("runs/esc10-*"), signed("runs/other-*"), signed("none")}) == 3


def test_memory_counts_the_teacher_and_what_it_hears(
    packed: Path, cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = {"mel.num_bands": 64, "mel.hop_ms": 5.0, "encoder.stem_channels": [64, 64], "train.epochs": 1}
    teacher = tiny(packed, cache_dir, tmp_path, TEACHER | large)
    saved = load_model(run_here(teacher).checkpoint)
    alone, taught = (
        tiny(packed, cache_dir, tmp_path, changes) for changes in ({}, {"distill.teacher": str(run_folder(teacher))})
    )
    weights = sum(weight.numel() * weight.element_size() for weight in saved.model.encoder.parameters())
    first_stage = 20 * 64 * 64 * teacher.num_frames * 4  # clips x channels x bands x frames, float32
    peak = peak_training_bytes(alone, teachers=[teacher])
    assert peak > weights + 2 * first_stage
    assert (
        peak_training_bytes(alone, teachers=[teacher] * 3) == peak + 2 * weights
    )  # they are heard one after the other
    assert largest_peak_bytes([taught]) == peak > 2 * largest_peak_bytes([alone])
    monkeypatch.setattr(memory, "memory_limit_bytes", lambda _: 2 * peak_training_bytes(alone))
    check_memory(alone, torch.device("cpu"))
    with pytest.raises(ConfigError, match="GB at training's peak"):
        check_memory(taught, torch.device("cpu"))
