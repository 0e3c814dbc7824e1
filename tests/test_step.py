"""What moves with a step moves as the library that it stands in for would move it."""

import torch
from timm.utils import ModelEmaV3
from torch import nn

from meamtm.training.step import Average


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
