"""What a config costs is what its model costs."""

from typing import Any

import pytest
import torch

from meamtm.config import RunConfig, from_flat
from meamtm.model.cost import cost
from meamtm.model.transformer import AudioTransformer

PLAIN = {
    "encoder.stem": "patch",
    "encoder.patch": [16, 8],
    "encoder.stride": [16, 8],
    "encoder.heads": 3,
    "encoder.head_dim": 16,
    "encoder.depth": 2,
    "encoder.mlp_ratio": 4,
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        PLAIN,
        {"encoder.pool": "cls", "encoder.depth": 3},
        {"encoder.pool": "attention", "encoder.stem_channels": [8, 16]},
        {"encoder.pool": "cls_dist", "encoder.positions": "separate"},
        {"mel.trainable": True, "mel.window_ms": 25},
    ],
)
@pytest.mark.parametrize("num_labels", [2, 10])
def test_parameters_are_the_models_own(changes: dict[str, Any], num_labels: int) -> None:
    config = from_flat(changes)
    model = AudioTransformer(config, num_labels)
    found = cost(config, num_labels)
    assert found.num_params == sum(parameter.numel() for parameter in model.parameters())
    tokens, _ = model.encoder.tokens(torch.zeros(1, 1, config.mel.num_bands, config.num_frames))
    assert found.num_tokens == tokens.shape[1]


def test_macs_are_those_computed_by_hand() -> None:
    width, tokens, labels = 48, (64 // 16) * (201 // 8), 7
    stem = tokens * width * 16 * 8
    block = tokens * width * 3 * width + 2 * tokens**2 * width + tokens * width**2 + 2 * tokens * width * 4 * width
    found = cost(from_flat(PLAIN), labels)
    assert found.num_tokens == tokens
    assert found.num_macs == stem + 2 * block + width * labels


def test_a_convolutional_stem_is_counted_too() -> None:
    """Two 3x3 convolutions at full size and two at half of it."""
    small = from_flat({"encoder.stem_channels": [8, 16], "encoder.depth": 1})
    large = from_flat({"encoder.stem_channels": [16, 16], "encoder.depth": 1})
    full, half = 64 * 201, 32 * 100
    more = full * 9 * (16 - 8) + full * 9 * (16 * 16 - 8 * 8) + half * 9 * (16 - 8) * 16
    assert cost(large).num_macs - cost(small).num_macs == more


def test_a_deeper_model_costs_more_and_a_longer_clip_costs_no_weights() -> None:
    base = cost(from_flat(PLAIN))
    deeper = cost(from_flat(PLAIN | {"encoder.depth": 4}))
    longer = cost(from_flat(PLAIN | {"data.clip_s": 10}))
    assert deeper.num_params > base.num_params
    assert deeper.num_macs > base.num_macs
    assert longer.num_params - base.num_params == 48 * (longer.num_tokens - base.num_tokens)  # positions alone
    assert longer.num_macs > 2 * base.num_macs


def test_counting_takes_no_memory_for_weights() -> None:
    huge = from_flat({"encoder.heads": 64, "encoder.head_dim": 256, "encoder.depth": 48, "encoder.stem": "patch"})
    assert cost(huge).num_params > 50e9


def test_counting_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    cost(RunConfig())
    assert torch.equal(torch.get_rng_state(), before)
