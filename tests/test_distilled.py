"""With `encoder.pool=deit` one head learns from labels, another from a teacher, and both answer."""

from pathlib import Path

import torch
import torch.nn.functional as F
from tiny import PLAIN, tiny

from meamtm.config import RunConfig, override
from meamtm.model.cost import cost
from meamtm.model.distilled import DistilledEncoder
from meamtm.model.transformer import AudioTransformer
from meamtm.training.checkpoint import load_model
from meamtm.training.loss import distillation_losses
from meamtm.training.memory import peak_training_bytes
from meamtm.training.prepare import TrainingBatch
from meamtm.training.run import run_here
from meamtm.training.step import make_learner, train_step
from meamtm.training.teacher import Teacher

DEIT = {**PLAIN, "encoder.pool": "deit", "distill.teacher": "elsewhere", "optim.name": "sgd", "optim.weight_decay": 0}


def made(config: RunConfig, num_labels: int = 3, seed: int = 0) -> AudioTransformer:
    torch.manual_seed(seed)
    return AudioTransformer(config, num_labels)


def test_in_training_both_heads_answer_and_else_their_mean(packed: Path, cache_dir: Path, tmp_path: Path) -> None:
    model = made(tiny(packed, cache_dir, tmp_path, DEIT))
    encoder = model.encoder
    assert isinstance(encoder, DistilledEncoder)
    waveform = 0.1 * torch.randn(5, 4_000)
    both = model.train()(waveform)
    assert both.shape == (5, 2, 3)
    encoder.patch_embed.eval()  # batch norm apart, what is computed is the same
    both = model(waveform)
    torch.testing.assert_close(model.eval()(waveform), both.mean(1))
    tokens, _ = encoder.tokens(model.image(waveform))
    torch.testing.assert_close(both[:, 0], encoder.head(tokens[:, 0]))
    torch.testing.assert_close(both[:, 1], encoder.head_dist(tokens[:, 1]))
    torch.testing.assert_close(model.features(waveform), tokens[:, :2].mean(1))


def test_labels_move_one_head_and_the_teacher_the_other(packed: Path, cache_dir: Path, tmp_path: Path) -> None:
    config = tiny(packed, cache_dir, tmp_path, DEIT | {"distill.weight": 0.3, "distill.temperature": 2.0})
    alone = override(config, {"encoder.pool": "cls_dist", "distill.teacher": "none"})
    model, teacher = made(config), made(alone, seed=1).eval()
    waveform, target = 0.1 * torch.randn(4, config.clip_samples), torch.eye(3)[[0, 1, 2, 0]]
    learner = make_learner(
        config, model, torch.device("cpu"), 10, multi_label=False, teachers=[Teacher(teacher, "elsewhere", "0")]
    )
    first, second = model.train()(waveform).unbind(1)
    labels = F.cross_entropy(first, target, label_smoothing=0.1, reduction="none")
    taught = distillation_losses(second, teacher(waveform), multi_label=False, temperature=2.0)
    head, head_dist = model.encoder.head, model.encoder.head_dist
    (of_labels,) = torch.autograd.grad(0.7 * labels.mean(), head.weight, retain_graph=True)
    (of_teacher,) = torch.autograd.grad(0.3 * taught.mean(), head_dist.weight)
    before = head.weight.detach().clone(), head_dist.weight.detach().clone()
    learner.optimizer.register_step_pre_hook(lambda *_: moved.extend(weight.grad.clone() for weight in heads))
    moved, heads = [], (head.weight, head_dist.weight)
    train_step(learner, TrainingBatch(waveform, target, None, 4, seed=0))
    torch.testing.assert_close(learner.losses[0], (0.7 * labels + 0.3 * taught).sum().detach())
    scale = moved[0].norm() / of_labels.norm()  # gradients are clipped together
    torch.testing.assert_close(moved[0], scale * of_labels)
    torch.testing.assert_close(moved[1], scale * of_teacher)
    assert all(not torch.equal(*pair) for pair in zip(before, heads, strict=True))


def test_a_run_learns_so_and_is_read_back(packed: Path, cache_dir: Path, tmp_path: Path) -> None:
    run_here(tiny(packed, cache_dir, tmp_path, {"name": "teacher", "encoder.cnn": "test_resnet"}))
    taught = {"name": "pupil", "encoder.pool": "deit", "distill.teacher": str(tmp_path / "teacher-*")}
    config = tiny(packed, cache_dir, tmp_path, taught | {"encoder.drop_path": 0.0, "pretrain.epochs": 1})
    outcome = run_here(config)
    saved = load_model(outcome.checkpoint)
    assert isinstance(saved.model.encoder, DistilledEncoder)
    assert outcome.evaluation is not None
    assert saved.model(torch.zeros(2, 4_000)).shape == (2, 10)
    assert cost(config).num_params == sum(weight.numel() for weight in saved.model.parameters())
    assert peak_training_bytes(config) > 4 * 4 * cost(config).num_params
