"""Batch norm's statistics, taken anew from training clips as they are.

What a model hears in training is shifted, played faster and mixed with other clips, so the means and variances that its
batch norms gather are not those of the clips that it will be asked about. Averaged weights have but averages of what
other weights gathered (Izmailov 2018, section 3.2). What training itself does is not touched: it normalises by each
batch."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from meamtm.config import RunConfig
from meamtm.data.clips import Clips
from meamtm.data.loader import Loader
from meamtm.model.precision import autocast
from meamtm.model.transformer import AudioTransformer
from meamtm.training.prepare import to_float

FEWEST_CLIPS = 16
"""Of a batch, whatever a part of training's has: the mean of variances within batches lacks what clips differ by
between them."""


@torch.no_grad()
def recalibrate(
    model: AudioTransformer,
    config: RunConfig,
    clips: Clips,
    indices: NDArray[np.int64],
    *,
    rank: int = 0,
    world_size: int = 1,
) -> None:
    """Replaces the running statistics by their means over one pass through clips that nothing was done to.

    Every rank hears its share, and all get the same statistics. A model without batch norm stays as it is.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    if not norms:
        return
    batch_size = max(config.train.clips_at_once, FEWEST_CLIPS)
    num_batches = min(-(-len(indices) // batch_size), max(len(indices) // world_size, 1))
    num_samples, batch_size, seed = config.clip_samples, -(-len(indices) // num_batches), config.train.seed
    loader = Loader(clips, indices, num_samples, batch_size, seed=seed, train=True, rank=rank, world_size=world_size)
    was_training, momentum = model.training, norms[0].momentum
    model.eval()
    for number, batch in enumerate(loader.epoch(0)):  # shuffled: batches of one class would vary too little
        for norm in norms:
            norm.train().momentum = 1 / (number + 1)  # the mean of all batches so far
        with autocast(config, model.mel.mean.device):
            model(to_float(batch.waveform, model.mel.mean.device))
    for norm in norms:
        norm.momentum = momentum
    model.train(was_training)
