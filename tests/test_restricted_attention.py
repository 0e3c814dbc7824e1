"""Tokens hear all but themselves, or one axis of the grid at a time, and nothing else."""

import pytest
import torch
from torch import Tensor

from meamtm.config import EncoderConfig
from meamtm.model.attention import Attention
from meamtm.model.encoder import Encoder
from meamtm.model.restricted_attention import LocalityAttention, SeparableAttention

ROWS, COLUMNS, WIDTH = 3, 4, 16


def tokens(num_tokens: int = ROWS * COLUMNS) -> Tensor:
    return torch.randn(2, num_tokens, WIDTH, generator=torch.Generator().manual_seed(0))


def local(inverse_temperature: float = 1.0) -> LocalityAttention:
    torch.manual_seed(1)
    made = LocalityAttention(WIDTH, num_heads=2, qkv_bias=True)
    torch.nn.init.constant_(made.inverse_temperature, inverse_temperature)
    return made


def separable(*, along_time: bool) -> SeparableAttention:
    torch.manual_seed(1)
    made = SeparableAttention(WIDTH, num_heads=2, qkv_bias=True)
    made.num_rows, made.along_time = ROWS, along_time
    return made


def heard_by(attention: Attention, place: int) -> set[int]:
    """Which tokens change what the one at `place` takes."""
    x = tokens().requires_grad_()
    attention(x)[0, place].square().sum().backward()
    assert x.grad is not None
    return set(x.grad[0].abs().sum(1).nonzero().flatten().tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_local_attention_is_a_softmax_over_the_others_at_its_own_temperature(dtype: torch.dtype) -> None:
    made, x = local(inverse_temperature=1.7), tokens()
    query, key, value = made.qkv(x).view(2, -1, 3, 2, 8).permute(2, 0, 3, 1, 4)
    scores = 1.7 * query @ key.transpose(2, 3) / 8**0.5
    scores.diagonal(dim1=2, dim2=3).fill_(-torch.inf)
    expected = made.proj((scores.softmax(3) @ value).transpose(1, 2).flatten(2))
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(made.to(dtype)(x.to(dtype)).float(), expected, atol=tolerance, rtol=tolerance)


@torch.no_grad()
def test_the_first_tokens_alone_take_what_they_take_among_all() -> None:
    made, x = local(0.6), tokens()
    torch.testing.assert_close(made(x, num_read=2), made(x)[:, :2])


@torch.no_grad()
def test_a_token_that_nobody_is_with_hears_itself() -> None:
    made, alone = local(), tokens(1)
    value = made.qkv(alone)[..., 2 * WIDTH :]
    torch.testing.assert_close(made(alone), made.proj(value))
    beside_padding = torch.tensor([True, False]).expand(2, 1, 1, 2)
    found = made(torch.cat((alone, alone), dim=1), beside_padding)
    torch.testing.assert_close(found[:, :1], made.proj(value))


@pytest.mark.parametrize(("along_time", "heard"), [(False, {1, 5, 9}), (True, {4, 5, 6, 7})])
def test_separable_attention_hears_one_axis(along_time: bool, heard: set[int]) -> None:
    """The patch in row 1 and column 1."""
    assert heard_by(separable(along_time=along_time), COLUMNS + 1) == heard


@torch.no_grad()
def test_of_one_row_or_column_separable_attention_is_joint() -> None:
    torch.manual_seed(1)
    joint = Attention(WIDTH, num_heads=2, qkv_bias=True)
    for num_rows, along_time in ((1, True), (12, False)):
        made = separable(along_time=along_time)
        made.num_rows = num_rows
        torch.testing.assert_close(made(tokens()), joint(tokens()))


def test_blocks_attend_along_each_axis_in_turn_and_together_hear_all() -> None:
    torch.manual_seed(0)
    changes = {"attention": "separable", "stem": "patch", "heads": 2, "head_dim": 8, "depth": 3, "drop_path": 0}
    made = Encoder(EncoderConfig.model_validate(changes), (32, 64), 3)
    assert [block.attn.along_time for block in made.blocks] == [False, True, False]
    image = torch.randn(1, 1, 32, 64, requires_grad=True)
    last, _ = made.tokens(image)
    last[0, 0].square().sum().backward()
    assert image.grad is not None
    assert image.grad.unfold(2, 16, 16).unfold(3, 16, 16).abs().amax((4, 5)).gt(0).all()


def test_a_learnt_temperature_is_no_weight_to_decay() -> None:
    made = Encoder(EncoderConfig.model_validate({"attention": "locality", "depth": 1}), (64, 64), 3)
    shapes = {name: weight.ndim for name, weight in made.named_parameters() if "temperature" in name}
    assert shapes == {"blocks.0.attn.inverse_temperature": 1}  # timm spares what has one axis
