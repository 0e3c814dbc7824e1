"""Grid of patches -> fewer of them, in training: regularisation that also saves time and memory (Koutini 2022)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

Grid = Float[Tensor, "batch row column width"]


class Patchout(nn.Module):
    """Leaves out whole rows (frequencies) and columns (times) of each clip, and then single patches.

    Fractions are of rows, columns, and the patches that are left. What stays keeps its order.
    """

    def __init__(self, single: float, rows: float, columns: float) -> None:
        super().__init__()
        self.single, self.rows, self.columns = single, rows, columns

    def forward(self, grid: Grid) -> Float[Tensor, "batch patch width"]:
        """Gives the patches that stay, row by row; all of them in evaluation."""
        if self.training:
            grid = _keep(grid, self.rows, dim=1)
            grid = _keep(grid, self.columns, dim=2)
        patches = grid.flatten(1, 2)  # (batch, patch, width)
        return _keep(patches, self.single, dim=1) if self.training else patches

    def num_kept(self, grid_size: tuple[int, int]) -> int:
        """Counts the patches of a training step."""
        return _num_kept(_num_kept(grid_size[0], self.rows) * _num_kept(grid_size[1], self.columns), self.single)


def _keep(values: Float[Tensor, "batch *rest"], fraction: float, dim: int) -> Float[Tensor, "batch *fewer"]:
    """Keeps all but a fraction of what lies along a dimension, drawn anew for each clip."""
    size = values.shape[dim]
    num_kept = _num_kept(size, fraction)
    if num_kept == size:
        return values
    order = torch.rand(len(values), size, device=values.device).argsort(1)[:, :num_kept].sort(1).values
    shape = [len(values)] + [1] * (values.ndim - 1)
    shape[dim] = num_kept
    wanted = [-1 if axis in (0, dim) else length for axis, length in enumerate(values.shape)]
    return values.gather(dim, order.view(shape).expand(wanted))


def _num_kept(size: int, fraction: float) -> int:
    return max(1, size - round(fraction * size))
