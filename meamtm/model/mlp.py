"""A block's MLP, which keeps half of what timm's keeps for the way back."""

import torch
from jaxtyping import Float
from timm.layers import Mlp as TimmMlp  # type: ignore[reportPrivateImportUsage]
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class Mlp(TimmMlp):
    """timm's MLP; the activation's output, as wide as its input, is computed anew on the way back.

    In a block of AST-base with half of the patches left out that is a quarter of the memory, for less than 1 % of the
    time (docs/results.md): the product behind it is not computed again. Nothing in here is drawn at random.
    """

    def forward(self, x: Float[Tensor, "batch token width"]) -> Float[Tensor, "batch token width"]:
        """Gives what each token makes of itself."""
        hidden = self.fc1(x)
        if not (self.training and torch.is_grad_enabled()) or torch.compiler.is_compiling():
            return self._narrow(hidden)
        return checkpoint(self._narrow, hidden, use_reentrant=False, preserve_rng_state=False)

    def _narrow(self, hidden: Float[Tensor, "batch token hidden"]) -> Float[Tensor, "batch token width"]:
        return self.fc2(self.norm(self.act(hidden)))
