"""What moves with a step moves as the library that it stands in for would move it."""

import pytest
import torch
from timm.utils import ModelEmaV3
from tiny import PLAIN, TINY
from torch import nn

from meamtm.config import from_flat
from meamtm.model.transformer import AudioTransformer
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
