"""Stems turn a spectrogram into the grid that they promise."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from meamtm.model.batch_norm import SharedBatchNorm2d
from meamtm.model.stem import ConvStem, PatchStem, ShiftedPatchStem, Stem


def grid(stem: Stem, bands: int, frames: int, num_clips: int = 2) -> torch.Size:
    return stem(torch.randn(num_clips, 1, bands, frames)).shape


@pytest.mark.parametrize(
    ("patch", "stride", "expected"),
    [
        ((16, 16), (16, 16), (4, 6)),  # what does not fill a patch is left out
        ((16, 16), (10, 10), (5, 9)),  # AST's overlap
        ((64, 2), (64, 2), (1, 50)),  # one patch holds all bands
        ((1, 1), (1, 1), (64, 100)),
    ],
)
def test_patches_are_counted_along_bands_and_frames(
    patch: tuple[int, int], stride: tuple[int, int], expected: tuple[int, int]
) -> None:
    stem = PatchStem((64, 100), patch, 8, stride)
    assert stem.grid_size == expected
    assert stem.num_patches == expected[0] * expected[1]
    assert grid(stem, 64, 100) == (2, *expected, 8)


@given(
    bands=st.integers(16, 40),
    frames=st.integers(16, 60),
    patch=st.tuples(st.integers(1, 16), st.integers(1, 16)),
    stride=st.integers(1, 16),
)
@settings(max_examples=40, deadline=None)
def test_the_grid_that_is_promised_is_the_grid_that_comes(
    bands: int, frames: int, patch: tuple[int, int], stride: int
) -> None:
    stem = PatchStem((16, 16), patch, 4, (min(stride, patch[0]), min(stride, patch[1])))
    assert grid(stem, bands, frames, 1) == (1, *stem.dynamic_feat_size((bands, frames)), 4)


@pytest.mark.parametrize("shape", [(2, 1, 16, 40), (1, 1, 16, 40), (2, 1, 16, 3)], ids=["clips", "one clip", "short"])
def test_every_stage_computes_on_channels_that_lie_side_by_side(shape: tuple[int, ...]) -> None:
    """An eighth of a training step's time, with the same numbers."""
    stem, outputs = ConvStem((16, 40), 8, (8, 12)), []
    for layer in stem.modules():
        if isinstance(layer, nn.Conv2d | nn.AvgPool2d):
            layer.register_forward_hook(lambda _layer, _inputs, output: outputs.append(output))
    stem(torch.randn(*shape)[:, :, ::2].repeat(1, 1, 2, 1))
    assert len(outputs) == 7
    assert all(output.stride(1) == 1 for output in outputs)


def test_a_patch_is_mapped_linearly_and_alone() -> None:
    stem = PatchStem((8, 8), (4, 4), 3, (4, 4))
    image = torch.randn(1, 1, 8, 8)
    patch = image[0, 0, 4:, :4].flatten()
    expected = torch.nn.functional.linear(patch, stem.proj.weight.flatten(1), stem.proj.bias)
    torch.testing.assert_close(stem(image)[0, 1, 0], expected)


@pytest.mark.parametrize(
    ("channels", "size", "expected"),
    [
        ((8,), (64, 100), (32, 50)),
        ((8, 12), (64, 101), (16, 25)),
        ((8, 8, 8, 8), (64, 251), (4, 15)),
        ((8, 8, 8, 8), (16, 16), (1, 1)),
    ],
)
def test_each_stage_of_convolutions_halves_the_grid(
    channels: tuple[int, ...], size: tuple[int, int], expected: tuple[int, int]
) -> None:
    stem = ConvStem(size, 6, channels)
    assert stem.grid_size == expected
    assert grid(stem, *size) == (2, *expected, 6)
    assert stem.feat_ratio() == 2 ** len(channels)


@given(bands=st.integers(8, 40), frames=st.integers(8, 70))
@settings(max_examples=20, deadline=None)
def test_odd_sizes_are_halved_rounding_down(bands: int, frames: int) -> None:
    stem = ConvStem((64, 64), 4, (8, 8, 8))
    assert grid(stem, bands, frames) == (2, *stem.dynamic_feat_size((bands, frames)), 4)


def test_a_stem_that_does_not_count_cannot_be_made() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Stem((64, 64), (16, 16))  # type: ignore[abstract]


def test_shared_batch_norm_is_batch_norm_in_one_process() -> None:
    shared, plain = SharedBatchNorm2d(5), nn.BatchNorm2d(5)
    batches = torch.randn(4, 3, 5, 6, 7) * 3 + 1
    for batch in batches:
        one, two = batch.clone().requires_grad_(), batch.clone().requires_grad_()
        torch.testing.assert_close(shared(one), plain(two), rtol=0, atol=0)
        shared(one).square().sum().backward()
        plain(two).square().sum().backward()
        torch.testing.assert_close(one.grad, two.grad, rtol=0, atol=0)
    assert shared.state_dict().keys() == plain.state_dict().keys()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(shared.state_dict()[name], value, rtol=0, atol=0)
    torch.testing.assert_close(shared.eval()(batches[0]), plain.eval()(batches[0]), rtol=0, atol=0)


def test_a_shifted_patch_holds_four_others_half_a_patch_away() -> None:
    torch.manual_seed(0)
    stem = ShiftedPatchStem((8, 12), (4, 4), 3, (4, 4))
    image = torch.randn(1, 1, 8, 12)
    around = nn.functional.pad(image, (2, 2, 2, 2))[0, 0]
    corners = [(2, 2), (0, 0), (0, 4), (4, 0), (4, 4)]  # of its own patch and of the others, for row 1 and column 1
    cells = torch.cat([around[4 + band : 8 + band, 4 + frame : 8 + frame].flatten() for band, frame in corners])
    torch.testing.assert_close(stem(image)[0, 1, 1], stem.proj(stem.norm(cells)))
