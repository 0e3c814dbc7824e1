"""Log-mel spectrogram -> grid of patches. All stems fit the `embed_layer` hook of timm's VisionTransformer, which
hands them its image size and asks back for their grid.

Where clips of several lengths share a batch, padded with zeros, a stem gives each the patches that it has alone."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from meamtm.model.batch_norm import SharedBatchNorm2d

Size = tuple[int, int]
Image = Float[Tensor, "batch 1 band frame"]
Grid = Float[Tensor, "batch row column width"]
Lengths = Int[Tensor, " batch"]
Activation = Literal["relu", "gelu", "silu"]


class Stem(nn.Module, ABC):
    """What timm asks of a patch embedding: the grid that an image of `img_size` (bands, frames) gives."""

    stride: Size
    """From one patch to the next."""

    def __init__(self, img_size: Size, patch_size: Size) -> None:
        super().__init__()
        self.img_size = img_size
        self.patch_size = patch_size
        self.grid_size = self.dynamic_feat_size(img_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    @abstractmethod
    def dynamic_feat_size(self, img_size: Size) -> Size:
        """Counts patches along bands and frames."""

    @abstractmethod
    def num_columns(self, num_frames: Lengths) -> Lengths:
        """Counts the patches along frames that hold something of a clip; one at least."""

    @abstractmethod
    def forward(self, image: Image, num_frames: Lengths | None = None) -> Grid:
        """Gives the grid of patches, channels last."""

    def _long_enough(self, image: Image) -> Float[Tensor, "batch 1 band longer"]:
        """Pads what is shorter than one patch with the mean, which is 0."""
        return F.pad(image, (0, max(self.patch_size[1] - image.shape[3], 0)))

    def feat_ratio(self, as_scalar: bool = True) -> int | Size:
        """Tells by how much the grid is coarser than the spectrogram."""
        return max(self.patch_size) if as_scalar else self.patch_size


class _Patches(Stem):
    """Patches of one size; a stride below it makes them overlap (Gong 2021, section 2.1)."""

    def __init__(self, img_size: Size, patch_size: Size, stride: Size) -> None:
        self.stride = stride
        super().__init__(img_size, patch_size)

    def dynamic_feat_size(self, img_size: Size) -> Size:
        """Counts the patches that fit whole."""
        bands, frames = (
            (size - patch) // step + 1 for size, patch, step in zip(img_size, self.patch_size, self.stride, strict=True)
        )
        return bands, frames

    def num_columns(self, num_frames: Lengths) -> Lengths:
        """Counts the patches that fit whole into a clip."""
        return ((num_frames - self.patch_size[1]) // self.stride[1] + 1).clamp(min=1)


class PatchStem(_Patches):
    """Maps each patch linearly."""

    def __init__(self, img_size: Size, patch_size: Size, embed_dim: int, stride: Size, **_: object) -> None:
        super().__init__(img_size, patch_size, stride)
        self.proj = nn.Conv2d(1, embed_dim, kernel_size=patch_size, stride=stride)

    def forward(self, image: Image, num_frames: Lengths | None = None) -> Grid:  # noqa: ARG002
        """Gives the grid of patches, channels last; a patch knows nothing of what lies beside it."""
        return self.proj(self._long_enough(image)).permute(0, 2, 3, 1)


class ShiftedPatchStem(_Patches):
    """Maps each patch together with four others, half a patch away along both axes, so that it knows what lies around
    it (shifted patch tokenisation, Lee 2021, section 3.1)."""

    def __init__(self, img_size: Size, patch_size: Size, embed_dim: int, stride: Size, **_: object) -> None:
        super().__init__(img_size, patch_size, stride)
        num_cells = 5 * patch_size[0] * patch_size[1]
        self.norm = nn.LayerNorm(num_cells)
        self.proj = nn.Linear(num_cells, embed_dim)

    def forward(self, image: Image, num_frames: Lengths | None = None) -> Grid:  # noqa: ARG002
        """Gives the grid of patches, channels last; around a clip all is 0, its mean, as padding is."""
        image = self._long_enough(image)
        bands, frames = image.shape[2:]
        above, before = self.patch_size[0] // 2, self.patch_size[1] // 2
        padded = F.pad(image, (before, before, above, above))
        corners = [(top, left) for top in (0, 2 * above) for left in (0, 2 * before)]
        shifted = [padded[:, :, top : top + bands, left : left + frames] for top, left in corners]
        cells = F.unfold(torch.cat((image, *shifted), dim=1), self.patch_size, stride=self.stride)
        patches = self.proj(self.norm(cells.transpose(1, 2)))  # (batch, patch, width)
        return patches.unflatten(1, (self.grid_size[0], -1))


class ConvStem(Stem):
    """Stages of two 3x3 convolutions and 2x2 average pooling, then a linear map to the encoder's width.

    Small convolutions give a transformer the locality that it cannot learn from a few hundred clips (Hassani 2021,
    Xiao 2021). Strided maps stay small, so it costs less than one block of AST-base.
    """

    def __init__(
        self, img_size: Size, embed_dim: int, channels: Sequence[int], activation: Activation = "relu", **_: object
    ) -> None:
        self.num_stages = len(channels)
        self.stride = (2**self.num_stages, 2**self.num_stages)
        super().__init__(img_size, (2**self.num_stages, 2**self.num_stages))
        sizes = zip((1, *channels[:-1]), channels, strict=True)
        self.stages = nn.Sequential(*(_stage(fan_in, fan_out, activation) for fan_in, fan_out in sizes))
        self.proj = nn.Conv2d(channels[-1], embed_dim, kernel_size=1)

    def dynamic_feat_size(self, img_size: Size) -> Size:
        """Halves the size once per stage, rounding down as the pooling does."""
        return img_size[0] >> self.num_stages, img_size[1] >> self.num_stages

    def num_columns(self, num_frames: Lengths) -> Lengths:
        """Halves the length once per stage."""
        return (num_frames >> self.num_stages).clamp(min=1)

    def forward(self, image: Image, num_frames: Lengths | None = None) -> Grid:
        """Gives the grid of patches, channels last."""
        image = self._long_enough(image)
        if torch.is_grad_enabled():  # without, as when batch norm's statistics are taken anew, sums stay the exact ones
            image = _channels_last(image)
        image = self.stages(image) if num_frames is None else self._stages_by_length(image, num_frames)
        return self.proj(image).permute(0, 2, 3, 1)

    def _stages_by_length(
        self, image: Float[Tensor, "batch 1 band frame"], num_frames: Lengths
    ) -> Float[Tensor, "batch channel row column"]:
        """Sets what lies beyond a clip's end to zero before each convolution, as if the clip ended there."""
        length = num_frames.clamp(min=self.patch_size[1])
        for stage in self.stages:
            for layer in stage:  # type: ignore[reportGeneralTypeIssues]
                if isinstance(layer, nn.Conv2d):
                    image = image * _within(length, image)
                image = layer(image)
            length = length // 2
        return image * _within(length, image)


def _channels_last(image: Image) -> Image:
    """Lays an image out with its one channel last, which torch takes it for already, whatever its strides say; but
    then the first stage would compute channel by channel, and a training step take an eighth longer on a CPU."""
    return image.contiguous().squeeze(1).unsqueeze(-1).movedim(-1, 1)


def _within(length: Lengths, image: Float[Tensor, "batch channel row column"]) -> Float[Tensor, "batch 1 1 column"]:
    column = torch.arange(image.shape[3], device=image.device)
    return (column < length[:, None])[:, None, None, :].to(image.dtype)


def _stage(fan_in: int, fan_out: int, activation: Activation) -> nn.Sequential:
    first, second = _convolution(fan_in, fan_out, activation), _convolution(fan_out, fan_out, activation)
    return nn.Sequential(*first, *second, nn.AvgPool2d(2))


def _convolution(fan_in: int, fan_out: int, activation: Activation) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(fan_in, fan_out, kernel_size=3, padding=1, bias=False)
    convolution.weight = nn.Parameter(convolution.weight.contiguous(memory_format=torch.channels_last))
    return convolution, SharedBatchNorm2d(fan_out), _activation(activation)


def _activation(name: Activation) -> nn.Module:
    match name:
        case "relu":
            return nn.ReLU(inplace=True)
        case "gelu":
            return nn.GELU()
        case "silu":
            return nn.SiLU(inplace=True)
