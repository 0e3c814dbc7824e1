"""Where a patch lies -> a vector to add to it, for grids of any length.

A clip shorter than those trained on uses the first columns; a longer one stretches them over its length, linearly
between two. Without branches on lengths, so that an exported model keeps its freedom."""

import torch
from jaxtyping import Float, Int
from timm.layers import trunc_normal_  # type: ignore[reportPrivateImportUsage]
from torch import Tensor, nn

Grid = Float[Tensor, "batch row column width"]
Positions = Float[Tensor, "clip row column width"]
"""Of each clip, or of one for all."""


class JointPositions(nn.Module):
    """One vector for each row and column, and one for each prefix token, as in ViT and AST."""

    def __init__(self, grid_size: tuple[int, int], width: int, num_prefix: int) -> None:
        super().__init__()
        rows, columns = grid_size
        self.grid = nn.Parameter(torch.empty(1, rows, columns, width))
        self.first = nn.Parameter(torch.empty(1, num_prefix, width)) if num_prefix else None
        for parameter in self.parameters():
            trunc_normal_(parameter, std=0.02)

    def forward(self, grid: Grid, num_columns: Int[Tensor, " batch"] | None = None) -> Positions:
        """Gives what is to be added to a grid of patches; `num_columns` counts those that are not padding."""
        return along_time(self.grid, grid.shape[2], num_columns)

    def prefix(self) -> Float[Tensor, "1 prefix width"] | float:
        """Gives what is to be added to the prefix tokens."""
        return 0.0 if self.first is None else self.first


class SeparatePositions(nn.Module):
    """One vector for each row and one for each column, added (Koutini 2022, section 3.2): fewer weights, and a column
    means the same with rows left out."""

    def __init__(self, grid_size: tuple[int, int], width: int) -> None:
        super().__init__()
        rows, columns = grid_size
        self.freq = nn.Parameter(torch.empty(1, rows, 1, width))
        self.time = nn.Parameter(torch.empty(1, 1, columns, width))
        for parameter in self.parameters():
            trunc_normal_(parameter, std=0.02)

    def forward(self, grid: Grid, num_columns: Int[Tensor, " batch"] | None = None) -> Positions:
        """Gives what is to be added to a grid of patches; `num_columns` counts those that are not padding."""
        return self.freq + along_time(self.time, grid.shape[2], num_columns)

    def prefix(self) -> float:
        """Prefix tokens learn what they are by themselves."""
        return 0.0


def along_time(
    positions: Float[Tensor, "1 row trained width"],
    length: int | torch.SymInt,
    num_columns: Int[Tensor, " clip"] | None = None,
) -> Float[Tensor, "clip row length width"]:
    """Cuts or stretches positions to `length` columns, for each clip's own number of columns where that is given."""
    trained = positions.shape[2]
    if num_columns is None and not torch.compiler.is_exporting() and length <= trained:
        return positions[:, :, :length]
    column = torch.arange(length, device=positions.device)
    last = column[-1:] if num_columns is None else num_columns - 1  # (clip,): a clip's last column
    place = column * ((trained - 1) / last.clamp(min=trained - 1).clamp(min=1))[:, None]  # (clip, length)
    place = place.clamp(max=trained - 1)
    before = place.floor().long()
    after = (before + 1).clamp(max=trained - 1)
    share = (place - before)[:, None, :, None]  # (clip, 1, length, 1)
    rows = positions[0].transpose(0, 1)  # (trained, row, width)
    first, second = (rows[index].transpose(1, 2) for index in (before, after))  # (clip, row, length, width)
    return torch.lerp(first, second, share.to(first.dtype))
