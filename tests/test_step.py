"""What moves with a step moves as the library that it stands in for would move it."""

import copy

import pytest
import torch
from timm.utils import ModelEmaV3
from tiny import PLAIN, TINY
from torch import Tensor, nn

from meamtm.config import from_flat
from meamtm.model.transformer import AudioTransformer
from meamtm.training.loss import clip_losses
from meamtm.training.prepare import TrainingBatch
from meamtm.training.step import Average, make_learner, train_step


def test_the_average_is_timms() -> None:
    """Weights, batch norm's moments and its counter, through the warm-up of the decay."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3))
    ours, timms = Average(model, 0.9), ModelEmaV3(model, decay=0.9, use_warmup=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for step in range(12):
        model(torch.randn(2, 1, 5, 5)).square().sum().backward()
        optimizer.step()
        ours.update(model, step=step)
        timms.update(model, step=step)
    assert ours.state_dict().keys() == timms.state_dict().keys()
    for key, value in timms.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, msg=key)


def test_a_batch_in_parts_moves_the_weights_as_the_whole_does() -> None:
    torch.manual_seed(0)
    waveform, target = 0.1 * torch.randn(12, 4_000), torch.eye(10)[torch.arange(12) % 10]
    mask = torch.rand(12, 16, 26) < 0.1
    heard, losses, weights = [], [], []
    for steps in (1, 5):
        changes = {**PLAIN, "encoder.stem": "patch", "encoder.patch": [8, 6], "train.accumulation_steps": steps}
        config = from_flat({**TINY, **changes, "encoder.stride": [8, 3]})
        torch.manual_seed(0)
        model = AudioTransformer(config, 10)
        learner = make_learner(config, model, torch.device("cpu"), 100, multi_label=False)
        model.encoder.register_forward_pre_hook(lambda _, images: heard.append(len(images[0])))
        for _ in range(3):
            train_step(learner, TrainingBatch(waveform, target, mask, 12, 0))
        losses.append([float(loss) for loss in learner.losses])
        weights.append(torch.cat([weight.detach().flatten() for weight in model.parameters()]))
    assert heard == 3 * [12] + 3 * [3, 3, 2, 2, 2]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert losses[0][2] < losses[0][0]
    torch.testing.assert_close(weights[1], weights[0], atol=1e-5, rtol=0)


def test_a_sharpness_aware_step_follows_the_gradient_of_the_worst_place_nearby() -> None:
    """Against algorithm 1 of the paper, done by hand on a twin; statistics are of the first pass alone."""
    torch.manual_seed(0)
    rho, lr = 0.05, 0.1
    batch = TrainingBatch(0.1 * torch.randn(8, 4_000), torch.eye(10)[:8], None, 8, 0)
    changes = {"name": "momentum", "lr": lr, "schedule": "constant", "warmup": 0, "weight_decay": 0, "clip_grad": 0}
    optim = {f"optim.{key}": value for key, value in changes.items()}
    config = from_flat({**TINY, **PLAIN, **optim, "optim.sam_rho": rho, "loss.label_smoothing": 0})
    model = AudioTransformer(config, 10)
    twin = copy.deepcopy(model)
    learner = make_learner(config, model, torch.device("cpu"), 10, multi_label=False)
    train_step(learner, batch)

    loss, uphill = _loss_and_gradients(twin, batch)
    statistics = {key: value.clone() for key, value in twin.named_buffers() if "running" in key}
    steepness = torch.cat([gradient.flatten() for gradient in uphill]).norm()
    climbed = copy.deepcopy(twin)
    with torch.no_grad():
        for weight, gradient in zip(climbed.parameters(), uphill, strict=True):
            weight.add_(rho * gradient / steepness)
    worst_loss, gradients = _loss_and_gradients(climbed, batch)
    assert worst_loss > loss
    assert float(learner.losses[0]) == pytest.approx(8 * loss, rel=1e-5)
    for new, old, gradient in zip(model.parameters(), twin.parameters(), gradients, strict=True):
        torch.testing.assert_close(new.detach(), old.detach() - lr * gradient, atol=1e-6, rtol=1e-4)
    for key, value in statistics.items():
        torch.testing.assert_close(dict(model.named_buffers())[key], value, msg=key)


def _loss_and_gradients(model: AudioTransformer, batch: TrainingBatch) -> tuple[float, tuple[Tensor, ...]]:
    loss = clip_losses(model(batch.waveform), batch.target, multi_label=False, smoothing=0.0).mean()
    return loss.item(), torch.autograd.grad(loss, list(model.parameters()))
