"""The encoder hears a clip the same way alone and in company, at every length, with rows and columns left out."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from meamtm.config import EncoderConfig
from meamtm.model.encoder import Encoder
from meamtm.model.patchout import Patchout
from meamtm.model.positions import JointPositions, SeparatePositions, along_time

SMALL = {"stem_channels": [8, 8], "patch": [8, 8], "stride": [8, 4], "heads": 2, "head_dim": 8, "depth": 2}
POOLS = ("mean", "cls", "cls_dist", "attention")
STEMS = ("conv", "patch", "shifted_patch")
ATTENTION = ("joint", "locality", "separable")
POSITIONS = ("joint", "separate")


def encoder(**changes: Any) -> Encoder:
    torch.manual_seed(0)
    made = Encoder(EncoderConfig.model_validate(SMALL | changes), (16, 40), 5).eval()
    for parameter in made.parameters():  # what begins at zero would hide differences
        nn.init.normal_(parameter, std=0.3)
    return made


def image(num_clips: int = 3, num_frames: int = 40, seed: int = 1) -> Tensor:
    return torch.randn(num_clips, 1, 16, num_frames, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("pool", POOLS)
@torch.no_grad()
def test_a_clip_alone_equals_the_same_clip_in_a_padded_batch(pool: str, stem: str, positions: str) -> None:
    """Shorter than a patch, shorter than those trained on, as long, and longer."""
    alone, padded = alone_and_padded(encoder(pool=pool, stem=stem, positions=positions))
    torch.testing.assert_close(alone, padded, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("attention", ["locality", "separable"])
@torch.no_grad()
def test_so_it_does_where_attention_is_restricted(attention: str, stem: str) -> None:
    """Of the shortest clips with one row there is but one patch, which then hears itself."""
    for changes in ({}, {"stem_channels": [8] * 4, "patch": [16, 8]}):
        alone, padded = alone_and_padded(encoder(attention=attention, stem=stem, **changes))
        torch.testing.assert_close(alone, padded, atol=1e-5, rtol=1e-5)


def alone_and_padded(made: Encoder) -> tuple[Tensor, Tensor]:
    """Logits (clip, label) of clips of several lengths, one by one and in one padded batch."""
    lengths = [3, 9, 22, 40, 41, 90]
    clips = [image(1, length, seed=length) for length in lengths]
    padded = torch.cat([nn.functional.pad(clip, (0, 90 - clip.shape[3])) for clip in clips])
    return torch.cat([made(clip) for clip in clips]), made(padded, torch.tensor(lengths))


@pytest.mark.parametrize("stem", STEMS)
@torch.no_grad()
def test_what_is_padding_is_never_heard(stem: str) -> None:
    made = encoder(stem=stem, pool="mean")
    padded, length = image(1, 60), torch.tensor([33])
    padded[..., 33:] = 0
    expected = made(padded, length)
    tokens, heard = made.tokens(padded, length)
    assert heard is not None
    assert not heard.all()
    assert tokens.shape[:2] == heard.shape
    assert not torch.allclose(made(padded), expected)  # without the length, silence counts


@given(trained=st.integers(1, 30), length=st.integers(1, 60))
@settings(max_examples=60)
def test_positions_are_cut_for_short_clips_and_stretched_for_long_ones(trained: int, length: int) -> None:
    ramp = torch.arange(float(trained)).view(1, 1, trained, 1)
    found = along_time(ramp, length, torch.tensor([length]))[0, 0, :, 0]
    if length <= trained:
        assert torch.equal(found, torch.arange(float(length)))
    else:
        torch.testing.assert_close(found, torch.linspace(0, trained - 1, length), atol=1e-4, rtol=0)
    torch.testing.assert_close(along_time(ramp, length)[0, 0, :, 0], found)


def test_separate_positions_are_a_sum_of_rows_and_columns() -> None:
    rows, columns, width = 4, 6, 8
    grid = torch.zeros(1, rows, columns, width)
    separate, joint = SeparatePositions((rows, columns), width), JointPositions((rows, columns), width, 0)
    found = separate(grid)
    torch.testing.assert_close(found[0, 2, 3] - found[0, 2, 1], found[0, 0, 3] - found[0, 0, 1])
    assert sum(weight.numel() for weight in separate.parameters()) == (rows + columns) * width
    assert sum(weight.numel() for weight in joint.parameters()) == rows * columns * width


def test_positions_and_tokens_lose_no_weight() -> None:
    spared, there = set(), set()
    for pool in ("cls_dist", "attention"):
        made = encoder(pool=pool, positions="separate")
        spared |= made.no_weight_decay()
        there |= {name for name, _ in made.named_parameters()}
    assert spared == {"cls_token", "reg_token", "attn_pool.latent", "positions.freq", "positions.time"}
    assert spared <= there


def numbered(rows: int, columns: int, num_clips: int = 3) -> Tensor:
    """A grid in which each patch holds its row and its column."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack((row, column), dim=2).float().expand(num_clips, -1, -1, -1)


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 12),
    row_part=st.floats(0, 0.9),
    column_part=st.floats(0, 0.9),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_whole_rows_and_columns_are_left_out(
    rows: int, columns: int, row_part: float, column_part: float, seed: int
) -> None:
    torch.manual_seed(seed)
    patchout = Patchout(0.0, row_part, column_part).train()
    kept = patchout(numbered(rows, columns))
    for clip in kept.long():
        left_rows, left_columns = clip[:, 0].unique(), clip[:, 1].unique()
        assert len(left_rows) == max(1, rows - round(row_part * rows))
        assert len(left_columns) == max(1, columns - round(column_part * columns))
        expected = torch.cartesian_prod(left_rows, left_columns)  # all that is left, in order
        assert torch.equal(clip, expected)
    assert kept.shape[1] == patchout.num_kept((rows, columns))


def test_patchout_draws_for_each_clip_and_rests_in_evaluation() -> None:
    patchout = Patchout(0.25, 0.5, 0.5)
    grid = numbered(8, 12, num_clips=20)
    assert torch.equal(patchout.eval()(grid), grid.flatten(1, 2))
    kept = patchout.train()(grid)
    assert kept.shape[1] == patchout.num_kept((8, 12)) == 18
    assert len({tuple(clip.flatten().tolist()) for clip in kept}) > 15


@pytest.mark.parametrize("pool", POOLS)
def test_prefix_tokens_are_never_left_out(pool: str) -> None:
    """Also with two of them, where timm's distilled models drop one."""
    made = encoder(pool=pool, stem="patch", patchout_time=0.5, patchout_freq=0.5).train()
    seen: list[Tensor] = []
    made.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    made(image())
    num_prefix = {"cls": 1, "cls_dist": 2}.get(pool, 0)
    rows, columns = made.patch_embed.grid_size
    assert seen[0].shape[1] == num_prefix + (rows // 2) * (columns - round(columns / 2))
    if num_prefix:
        prefix = torch.cat([token for token in (made.cls_token, made.reg_token) if token is not None], 1)
        expected = (prefix + made.positions.prefix()).expand(3, -1, -1)
        torch.testing.assert_close(seen[0][:, :num_prefix], expected)


@pytest.mark.parametrize("stem", STEMS)
def test_checkpointing_changes_memory_and_no_gradient(stem: str) -> None:
    plain, frugal = encoder(stem=stem, drop_path=0.3).train(), encoder(stem=stem, drop_path=0.3).train()
    frugal.set_grad_checkpointing(True)
    for made in (plain, frugal):
        torch.manual_seed(3)
        made(image()).square().sum().backward()
    for (name, one), (_, two) in zip(plain.named_parameters(), frugal.named_parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, msg=name)


@pytest.mark.parametrize("pool", ["cls", "cls_dist"])
@pytest.mark.parametrize("in_training", [False, True])
def test_what_nobody_reads_of_the_last_block_is_left_out_and_changes_nothing(pool: str, in_training: bool) -> None:
    torch.manual_seed(0)
    config = EncoderConfig.model_validate({"stem": "patch", "heads": 2, "depth": 2, "pool": pool, "drop_path": 0})
    made = Encoder(config, (32, 64), 3).train(in_training)
    image = torch.randn(2, 1, 32, 64)
    tokens, heard = made.tokens(image)
    whole = made.head(made.head_drop(made.fc_norm(made._summary(tokens, heard))))
    torch.testing.assert_close(made(image), whole, atol=1e-6, rtol=1e-5)
    weights = list(made.parameters())
    for ours, theirs in zip(
        *(torch.autograd.grad(logits.square().sum(), weights) for logits in (made(image), whole)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
