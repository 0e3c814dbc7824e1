"""A run learns from another one of the same clips, which it finds by its folds, and from no other."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import PLAIN, tiny
from torch import Tensor

from meamtm.config import RunConfig, from_flat, override, signature
from meamtm.crossval import cross_validate
from meamtm.data.pack import pack
from meamtm.data.synth import write_synth
from meamtm.errors import CheckpointError, ConfigError
from meamtm.model.transformer import AudioTransformer
from meamtm.training.checkpoint import load_model, newest
from meamtm.training.context import Stopped
from meamtm.training.loss import distance_to_teacher
from meamtm.training.memory import peak_training_bytes
from meamtm.training.prepare import TrainingBatch
from meamtm.training.run import run_folder, run_here
from meamtm.training.step import make_learner, train_step
from meamtm.training.teacher import find_teacher, load_teacher

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
    one = distance_to_teacher(ours, theirs, multi_label=False, temperature=temperature)
    p, q = (theirs / temperature).softmax(1), (ours / temperature).softmax(1)
    torch.testing.assert_close(one, temperature**2 * (p * (p / q).log()).sum(1))
    several = distance_to_teacher(ours, theirs, multi_label=True, temperature=temperature)
    p, q = (theirs / temperature).sigmoid(), (ours / temperature).sigmoid()
    binary = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    torch.testing.assert_close(several, temperature**2 * binary.sum(1))


@pytest.mark.parametrize("multi_label", [False, True])
def test_who_says_what_the_teacher_says_has_nothing_to_learn(multi_label: bool) -> None:
    ours = (1e3 * logits(2)).requires_grad_()  # as sure as logits can be
    distance = distance_to_teacher(ours, ours.detach(), multi_label=multi_label, temperature=1.0)
    torch.testing.assert_close(distance, torch.zeros_like(distance))
    assert torch.autograd.grad(distance.sum(), ours)[0].abs().max() < 1e-9


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
    learner = make_learner(config, model, device, 10, multi_label=False, teacher=teacher)
    ours = model.train()(waveform, mask)
    labels = F.cross_entropy(ours, target, label_smoothing=0.1, reduction="none")
    taught = distance_to_teacher(ours, teacher(waveform), multi_label=False, temperature=2.0)
    train_step(learner, TrainingBatch(waveform, target, mask, 4, seed=0))
    torch.testing.assert_close(learner.losses[0], (0.7 * labels + 0.3 * taught).sum().detach())
    assert all(torch.equal(weight, before[name]) for name, weight in teacher.state_dict().items())
    assert all(weight.grad is None for weight in teacher.parameters())


def test_a_pupil_comes_to_say_what_its_teacher_says(packed: Path, cache_dir: Path, tmp_path: Path, runs: Path) -> None:
    """Also where it hears no label."""
    changes = {"distill__weight": 1.0, "train__epochs": 30, "train__checkpoint_s": 60}
    taught = run_here(pupil(packed, cache_dir, tmp_path, runs, **changes))
    untaught = run_here(tiny(packed, cache_dir, tmp_path, {"train.epochs": 30, "train.checkpoint_s": 60}))
    teacher = load_teacher(pupil(packed, cache_dir, tmp_path, runs), torch.device("cpu"))
    assert teacher is not None
    noise = 0.1 * torch.randn(64, 4_000, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = teacher(noise)
        found = [load_model(run.checkpoint).model(noise) for run in (taught, untaught)]
    near, far = (
        float(distance_to_teacher(each, expected, multi_label=False, temperature=1.0).mean()) for each in found
    )
    assert near < 0.5 * far


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


def test_the_teacher_has_the_run_s_folds_and_its_seed_where_there_are_several(
    packed: Path, cache_dir: Path, runs: Path
) -> None:
    def taught_by(**changes: Any) -> tuple[int | None, int]:
        found = find_teacher(pupil(packed, cache_dir, runs, runs, **changes))
        assert found is not None
        teacher = load_model(found).config
        return teacher.data.test_fold, teacher.train.seed

    assert taught_by(data__test_fold=1) == taught_by(data__test_fold=1, train__seed=7) == (1, 0)
    assert taught_by(data__test_fold=2) == (2, 0)
    assert taught_by(data__test_fold=2, train__seed=1) == (2, 1)
    assert find_teacher(tiny(packed, cache_dir, runs)) is None
    assert find_teacher(pupil(packed, cache_dir, runs, runs, name="teacher")) is not None


def test_a_run_does_not_teach_itself(packed: Path, cache_dir: Path, tmp_path: Path, runs: Path) -> None:
    (tmp_path / "teacher-1").symlink_to(run_folder(tiny(packed, cache_dir, runs, TEACHER)))
    config = pupil(packed, cache_dir, tmp_path, tmp_path, name="teacher-2")
    before = find_teacher(config)
    own = run_here(config)
    assert own.folder.match("teacher-2-*")
    assert find_teacher(config) == before
    assert before is not None
    assert before.parent == tmp_path / "teacher-1"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"data__test_fold": 4}, r"0 of 4 runs there have data.test_fold=4"),
        ({"data__valid_fold": 3}, r"0 of 4 runs there have data.test_fold=1 data.valid_fold=3 .*; train it first"),
        ({"data__test_fold": 3}, r"teacher-\w+ is not trained to its end; finish it first"),
        ({"data__test_fold": 2, "train__seed": 5}, r"2 of 4 runs there have .*; name one of them: .*teacher-"),
        ({"mel__sample_rate_hz": 16_000}, r"0 of 4 runs there have .* mel.sample_rate_hz=16000; train it first"),
        ({"distill__teacher": "nowhere/at-all"}, r"^distill.teacher=.*at-all: no run is there that has"),
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
    with pytest.raises(CheckpointError, match=r"distill.teacher=.*was trained on other data"):
        run_here(pupil(tmp_path / "packed", cache_dir, tmp_path / "runs", runs))


def test_a_cross_validation_has_a_teacher_for_each_fold_or_does_not_begin(
    packed: Path, cache_dir: Path, tmp_path: Path, runs: Path
) -> None:
    config = pupil(packed, cache_dir, tmp_path, runs, train__epochs=1)
    with pytest.raises(ConfigError, match=r"data.test_fold=4"):
        cross_validate(config, folds=[1, 2, 4])
    assert not any(tmp_path.iterdir())
    result = cross_validate(config, folds=[1, 2])
    assert [row.fold for row in result.rows] == [1, 2]


def test_where_a_teacher_lies_does_not_change_the_signature() -> None:
    def signed(teacher: str) -> str:
        return signature(from_flat({"distill.teacher": teacher}))

    assert signed("runs/esc10-*") == signed("/mnt/runs/esc10-*")
    assert len({signed("runs/esc10-*"), signed("runs/other-*"), signed("none")}) == 3


def test_memory_counts_the_teacher(packed: Path, cache_dir: Path, tmp_path: Path, runs: Path) -> None:
    config = tiny(packed, cache_dir, tmp_path)
    folder = newest(run_folder(tiny(packed, cache_dir, runs, TEACHER)))
    assert folder is not None
    teacher = load_model(folder)
    alone, taught = peak_training_bytes(config), peak_training_bytes(config, teacher=teacher.config)
    weights = sum(weight.numel() * weight.element_size() for weight in teacher.model.encoder.parameters())
    assert taught >= alone + weights
